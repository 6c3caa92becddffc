# SPDX-License-Identifier: Apache-2.0
import json
import math

import pytest

from mol import MoLConfig


def test_defaults_are_the_documented_ones():
    config = MoLConfig(["a"])
    assert config.to_dict() == {
        "models": ["a"],
        "adapter_type": "linear",
        "router_type": "simple",
        "max_layers": None,
        "target_hidden_dim": None,
        "memory_efficient": True,
        "use_gradient_checkpointing": False,
        "device_map": None,
        "stream": "single",
        "gate": "bayes",
        "gate_share": 0.02,
        "cross_rank": 0,
        "top_k": None,
        "router_init": 0.9,
        "bottleneck_dim": None,
        "temperature": 1.0,
        "entropy_coeff": 0.0,
        "load_balance_coeff": 0.01,
        "dtype": None,
        "revisions": None,
        "trust_remote_code": False,
    }


def test_round_trip_through_json():
    config = MoLConfig(["a", "b"], stream="parallel", device_map={"a": "cpu"})
    assert MoLConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


BAD = [
    ("models", []),
    ("models", ["a", "a"]),
    ("models", "a"),
    ("models", [""]),
    ("models", [1]),
    ("adapter_type", "liner"),
    ("router_type", "token"),
    ("stream", "both"),
    ("gate", None),
    ("max_layers", 0),
    ("max_layers", True),
    ("target_hidden_dim", -1),
    ("target_hidden_dim", 64.0),
    ("memory_efficient", 1),
    ("temperature", 0),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("gate_share", 1.0),
    ("gate_share", -0.1),
    ("gate_share", math.nan),
    ("cross_rank", -1),
    ("top_k", 0),
    ("top_k", 3),
    ("router_init", 1.0),
    ("router_init", 0),
    ("entropy_coeff", -1),
    ("load_balance_coeff", math.inf),
    ("dtype", "float8"),
    ("device_map", {"c": "cpu"}),
    ("device_map", ["cpu"]),
    ("revisions", {"a": 1}),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_value_is_named(field, value):
    with pytest.raises(ValueError, match=field) as error:
        MoLConfig(**{"models": ["a", "b"], field: value})
    assert repr(value) in str(error.value)


LATER = {
    "adapter_type": "bottleneck",
    "gate": "learned",
    "cross_rank": 4,
    "top_k": 1,
    "trust_remote_code": True,
}


@pytest.mark.parametrize("field", LATER)
def test_option_of_a_later_release_is_refused_by_name(field):
    with pytest.raises(NotImplementedError, match=field):
        MoLConfig(["a"], **{field: LATER[field]})


def test_unknown_key_names_the_nearest_field():
    with pytest.raises(ValueError, match="'router_type'"):
        MoLConfig.from_dict({"models": ["a"], "router_typ": "simple"})
    with pytest.raises(ValueError, match="models"):
        MoLConfig.from_dict({"stream": "single"})


def test_near_miss_gets_a_hint():
    with pytest.raises(ValueError, match="did you mean 'token_level'"):
        MoLConfig(["a"], router_type="token-level")


def test_changed_config_is_validated_again():
    config = MoLConfig(["a"])
    config.max_layers = 0
    with pytest.raises(ValueError, match="max_layers"):
        config.validate()
