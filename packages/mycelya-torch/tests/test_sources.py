# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""No source of the package can unpickle or run what it receives."""

import ast
import re
from pathlib import Path

import pytest

import mycelya_torch

pytestmark = pytest.mark.critical

FOLDER = Path(__file__).parents[1]
PACKAGE = Path(mycelya_torch.__file__).parent
# A checkout may have turned the link into a text file.
NATIVE = (FOLDER / "csrc", FOLDER.parents[1] / "csrc/mycelya")
CSRC = next(folder for folder in NATIVE if folder.is_dir())

# Modules that read objects or code out of bytes.
MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dbm", "code", "codeop"}
MODULES |= {"dill", "cloudpickle", "joblib", "jsonpickle", "runpy", "pickletools"}
BUILTINS = {"eval", "exec", "compile"}
NAMES = BUILTINS | {f"builtins.{name}" for name in BUILTINS} | {"__builtins__"}
NAMES |= {f"yaml.{how}load" for how in ("", "full_", "unsafe_")}
NAMES |= {"torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"}
NAMES |= {"torch.export.load", "torch.serialization.load", "numpy.load"}
IMPORTERS = {"__import__", "importlib.import_module", "importlib.__import__"}
DANGER = re.compile(
    r"(?i)pickle|\b(?:jit|torch)::load\b|\b(?:popen|system|exec[lv]\w*)\("
)


def problems(source):
    """Return what a source uses that may run what it is given, with its line."""
    nodes, aliases, found, fine = list(ast.walk(ast.parse(source))), {}, [], set()
    for node in nodes:
        if isinstance(node, ast.Import):
            for one in node.names:
                top = one.name.partition(".")[0]
                aliases[one.asname or top] = one.name if one.asname else top
                found += [(one.name, node)] * is_module(one.name)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for one in node.names:
                name = aliases[one.asname or one.name] = f"{node.module}.{one.name}"
                found += [(name, node)] * (is_module(name) or name in NAMES)
    for node in nodes:
        if isinstance(node, ast.Call):
            name = dotted(node.func, aliases)
            if name == "torch.load" and is_safe(node):
                fine.add(node.func)
            for value in node.args * (name in IMPORTERS):
                text = value.value if isinstance(value, ast.Constant) else "?"
                found += [(f"{name}({text})", node)] * (text == "?" or is_module(text))
    for node in nodes:
        if isinstance(node, (ast.Name, ast.Attribute)) and node not in fine:
            name = dotted(node, aliases)
            found += [(name, node)] * (name in NAMES | {"torch.load"})
    return sorted({f"{node.lineno}: {name}" for name, node in found})


def is_module(name):
    return str(name).partition(".")[0] in MODULES


def is_safe(call):
    given = {key.arg: key.value for key in call.keywords}.get("weights_only")
    return isinstance(given, ast.Constant) and given.value is True


def dotted(node, aliases):
    """Return the full name that a name or attribute stands for."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, aliases)}.{node.attr}"
    return ""


def sources():
    return [*PACKAGE.rglob("*.py"), *(FOLDER / "examples").glob("*.py")]


def test_nothing_is_unpickled_or_executed():
    files = sources()
    assert {"_worker.py", "server.py", "_weights.py", "tcp.py"} <= {
        f.name for f in files
    }
    found = {path.name: what for path in files if (what := problems(path.read_bytes()))}
    assert found == {}


def test_neither_in_the_native_sources():
    files = [path for path in CSRC.iterdir() if path.suffix in (".cpp", ".h")]
    assert len(files) > 30
    found = {
        path.name: match[0]
        for path in files
        if (match := DANGER.search(path.read_text(encoding="utf-8")))
    }
    assert found == {}
    for planted in ("c10::Unpickler u(x);", "torch::load(m, f)", "::execvp(a, b)"):
        assert DANGER.search(planted)


PLANTED = [
    "import pickle",
    "import pickle as p",
    "def f(x):\n    from pickle import loads",
    "from _pickle import Unpickler",
    "import marshal, shelve",
    "import importlib\nimportlib.import_module('pickle')",
    "from importlib import import_module as get\nget('marshal')",
    "import importlib\nimportlib.import_module(name)",
    "__import__('pickle')",
    "eval(text)",
    "exec(text)",
    "run = exec",
    "list(map(eval, texts))",
    "import builtins\nbuiltins.exec(text)",
    "from builtins import eval as read\nread(text)",
    "__builtins__['eval'](text)",
    "code = compile(text, 'x', 'exec')",
    "import yaml\nyaml.load(text, yaml.SafeLoader)",
    "from yaml import unsafe_load",
    "from yaml import unsafe_load as y\ny(text)",
    "import torch\ntorch.load(file)",
    "import torch\ntorch.load(file, weights_only=False)",
    "import torch\ntorch.load(file, weights_only=flag)",
    "import torch\ntorch.load(file, **options)",
    "import torch as t\nt.load(file)",
    "from torch import load\nload(file)",
    "import torch\nread = torch.load",
    "import torch\ntorch.jit.load(file)",
    "import torch.serialization\ntorch.serialization.load(file)",
    "import numpy as np\nnp.load(file, allow_pickle=True)",
]
HARMLESS = """
import re
import safetensors.torch
import torch
from mycelya_torch import _library
model.eval()
_library.load()
re.compile("x")
torch.load(file, map_location="cpu", weights_only=True)
safetensors.torch.load(data)
'''import pickle; eval("x")'''
# exec("x")
"""


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_use_is_found(planted):
    assert problems(planted) != []
    assert problems(Path(__file__).read_text() + "\n" + planted) != []


def test_what_only_looks_alike_is_not_found():
    assert problems(HARMLESS) == []
    assert problems(Path(__file__).read_text()) == []
