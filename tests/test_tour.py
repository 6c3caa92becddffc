# SPDX-License-Identifier: Apache-2.0
"""The tour: its split, its yardstick, its cache, its promises and its page."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from mycelya_torch import get_all_machines
from tools.tour import (
    experts,
    figures,
    fusion_row,
    loraven_row,
    measures,
    report,
    run,
    table,
)
from tools.tour.corpus import (
    SHARED_WORDS,
    Corpus,
    Document,
    cut_test_windows,
    load_corpus,
    split_documents,
    word_runs,
)
from tools.tour.fusion_row import check_bound, check_gain, shade
from tools.tour.story import Measured, System
from tools.tour.training import Settings, train_to_folder

ROOT = Path(__file__).parents[1]
DOMAINS = ("prose", "code")
STEPS = 12


def tiny(steps: int) -> Settings:
    settings = Settings()
    recipes = {d: replace(r, steps=steps) for d, r in settings.recipes().items()}
    return replace(settings, **recipes)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


@pytest.fixture(scope="module", autouse=True)
def short_timings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "REPEATS", 2)
        patch.setattr(measures, "GENERATED_BYTES", 8)
        yield


@pytest.fixture(scope="module")
def tour(short_timings, tmp_path_factory) -> tuple[dict, Path, Path]:
    """A tour of a few steps: its figures, its output folder and its cache."""
    folder = tmp_path_factory.mktemp("a tour")
    out, cache = folder / "out", folder / "cache"
    figures_of_run = run.run_tour(tiny(STEPS), 1, 8, out, cache)
    return figures_of_run, out, cache


def made_up(name: str, prose: float, code: float) -> Measured:
    bits = {"prose": prose, "code": code, "mean": (prose + code) / 2, "switch": 1.0}
    nats = {text: torch.zeros(2) for text in DOMAINS}
    return Measured(name, "", bits, bits, nats, 1, 4, None)


class TestCorpus:
    @pytest.mark.critical
    def test_no_held_out_document_is_trained_on(self, corpus):
        trained = {(d.domain, d.name) for d in corpus.train}
        held_out = {(d.domain, d.name) for d in corpus.held_out}
        assert trained
        assert held_out
        assert not trained & held_out

    @pytest.mark.critical
    def test_no_run_of_words_is_on_both_sides(self, corpus):
        trained = set().union(*(word_runs(d.text) for d in corpus.train))
        for document in corpus.held_out:
            assert not word_runs(document.text) & trained, document.name

    def test_held_out_text_is_no_part_of_the_training_text(self, corpus):
        trained = " ".join(" ".join(d.text.split()) for d in corpus.train)
        for document in corpus.held_out:
            if len(document.text.split()) >= SHARED_WORDS:
                assert " ".join(document.text.split()) not in trained

    @pytest.mark.parametrize("domain", DOMAINS)
    def test_held_out_share(self, corpus, domain):
        held_out, trained = (len(corpus.text(domain, side)) for side in (True, False))
        assert 0.07 < held_out / (held_out + trained) < 0.22

    def test_the_split_does_not_depend_on_the_order(self, corpus):
        documents = [*corpus.train, *corpus.held_out]
        again = split_documents(documents[::-1])
        assert set(again.held_out) == set(corpus.held_out)

    def test_documents_that_quote_each_other_stay_together(self):
        shared = "one two three four five six seven eight nine ten eleven twelve"
        quoting = [Document("prose", f"p{n}", f"{shared} and {n}") for n in range(3)]
        quoting.append(Document("code", "c", f'"""{n_words(400)} {shared} end"""'))
        others = [Document("prose", f"q{n}", n_words(300, n)) for n in range(20)]
        split = split_documents([*quoting, *others])
        sides = [document in split.held_out for document in quoting]
        assert len(set(sides)) == 1
        assert split.held_out

    def test_windows_switch_in_the_middle(self, corpus):
        windows = cut_test_windows(corpus, 6, 32)
        assert all(ids.shape == (6, 32) for ids in windows.values())
        switch, prose, code = (windows[n] for n in ("switch", "prose", "code"))
        assert torch.equal(switch[0], torch.cat([code[0, :16], prose[0, 16:]]))
        assert torch.equal(switch[1], torch.cat([prose[1, :16], code[1, 16:]]))


def n_words(count: int, start: int = 0) -> str:
    return " ".join(f"word{start}x{n}" for n in range(count))


class TestYardstick:
    def windows(self, text: str, length: int) -> torch.Tensor:
        raw = text.encode()
        rows = [list(raw[i : i + length]) for i in range(0, len(raw), length)]
        return torch.tensor([row for row in rows if len(row) == length])

    @pytest.mark.critical
    def test_a_uniform_model_needs_8_bits_for_each_byte(self):
        ids = self.windows("plain ASCII text, and some more of it", 6)
        nats = measures.window_nats(
            lambda x: torch.full((*x.shape, 256), -math.log(256)), ids
        )
        assert measures.bits_per_character(nats, ids) == pytest.approx(8, abs=1e-5)

    def test_a_character_costs_the_sum_of_its_bytes(self):
        ids = self.windows("aé\u2013b", 7)
        nats = torch.full((1, 6), 8 * math.log(2), dtype=torch.float64)
        # Scored are é (2 bytes), the dash (3) and b: 48 bits over 3 characters.
        assert measures.count_characters(ids) == 3
        assert measures.bits_per_character(nats, ids) == pytest.approx(16)

    def test_probabilities_by_hand(self):
        ids = torch.tensor([[7, 1, 2]])
        probabilities = torch.full((1, 3, 256), 0.5 / 255)
        probabilities[0, 0, 1], probabilities[0, 1, 2] = 0.5, 0.25
        nats = measures.window_nats(lambda x: probabilities.log(), ids)
        by_hand = (1 + 2) / 2
        assert measures.bits_per_character(nats, ids) == pytest.approx(by_hand)

    def test_measure_counts_shared_parameters_once(self):
        part = torch.nn.Linear(3, 2)
        system = System(
            "s",
            "",
            lambda x: torch.full((*x.shape, 256), -math.log(256)),
            (part, torch.nn.Sequential(part)),
        )
        windows = {n: torch.ones(2, 5, dtype=torch.long) for n in (*DOMAINS, "switch")}
        measured = measures.measure(system, windows)
        assert (measured.parameters, measured.parameter_bytes) == (8, 32)
        assert measured.bits["mean"] == pytest.approx(8, abs=1e-5)
        assert measured.nats["switch"].shape == (2,)

    def test_shades_never_cut_a_character(self):
        pieces = shade("é\u2013x".encode(), torch.tensor([0.0, 1, 1, 0, 1, 0.5]))
        assert pieces == [("é", 0.0), ("\u2013", 1.0), ("x", 0.5)]


class TestPromises:
    @pytest.mark.critical
    @pytest.mark.parametrize(("fused", "kept"), [(1.95, True), (1.97, False)])
    def test_gain(self, fused, kept):
        rows = [made_up("prose model", 1.5, 3.0), made_up("code model", 2.5, 1.5)]
        rows.append(made_up("fused model", fused, fused))
        check = check_gain({row.name: row for row in rows})
        assert check.kept is kept
        assert "2.000 of the code model" in check.measured

    @pytest.mark.parametrize(("excess", "kept"), [(1.95, True), (1.97, False)])
    def test_bound(self, excess, kept):
        rows = [made_up(name, 1, 1) for name in ("prose model", "code model")]
        rows.append(made_up("fused model", 1, 1))
        rows[0].nats["code"] += 1
        rows[1].nats["prose"] += 1
        rows[2].nats["code"][1] += excess
        check = check_bound({row.name: row for row in rows}, share=0.02)
        assert math.log(2) - 126 * math.log(0.99) == pytest.approx(1.9595, abs=1e-4)
        assert check.kept is kept

    def test_a_broken_promise_fails_the_run(self, tour, monkeypatch, capsys):
        _, out, cache = tour
        monkeypatch.setattr(fusion_row, "MOST_BITS", 0.5)
        options = ["--steps", str(STEPS), "--windows", "4", "--cache", str(cache)]
        assert run.main([*options, "--out", str(out.parent / "broken")]) == 1
        message = capsys.readouterr().err
        assert "Promised: The fused model needs at most 0.5 times" in message
        assert "Measured: " in message


class TestCache:
    @pytest.mark.critical
    def test_second_run_does_not_train(self, tour, corpus, monkeypatch):
        monkeypatch.setattr(experts, "train_experts", None)
        found = experts.prepare_experts(tiny(STEPS), corpus, tour[2])
        assert found.cached
        assert set(found.folders) == set(DOMAINS)

    @pytest.fixture
    def trained(self, monkeypatch) -> list:
        """Training that only writes a file, and counts."""
        calls = []

        def train(settings, texts, folder):
            for domain in texts:
                (folder / domain).mkdir()
                (folder / domain / "model").write_text("weights")
            calls.append(settings)
            return {domain: [(1, 8.0)] for domain in texts}

        monkeypatch.setattr(experts, "train_experts", train)
        return calls

    def test_settings_and_text_decide_the_entry(self, corpus):
        keys = {
            experts.cache_key(Settings(), corpus),
            experts.cache_key(Settings(seed=1), corpus),
            experts.cache_key(tiny(3), corpus),
            experts.cache_key(Settings(), replace(corpus, digest="other")),
        }
        assert len(keys) == 4

    def test_an_interrupted_run_leaves_nothing(self, corpus, tmp_path, monkeypatch):
        def killed(settings, texts, folder):
            (folder / "prose").mkdir()
            raise KeyboardInterrupt

        monkeypatch.setattr(experts, "train_experts", killed)
        with pytest.raises(KeyboardInterrupt):
            experts.prepare_experts(Settings(), corpus, tmp_path)
        assert not list(tmp_path.iterdir())

    @pytest.mark.critical
    @pytest.mark.parametrize("damage", ["no index", "other weights", "lost file"])
    def test_half_an_entry_is_not_used(self, corpus, tmp_path, trained, damage):
        first = experts.prepare_experts(Settings(), corpus, tmp_path)
        assert not first.cached
        weights = first.folders["code"] / "model"
        if damage == "no index":
            (weights.parents[1] / experts.INDEX).unlink()
        elif damage == "other weights":
            weights.write_text("weigh")
        else:
            weights.unlink()
        again = experts.prepare_experts(Settings(), corpus, tmp_path)
        assert not again.cached
        assert len(trained) == 2
        assert weights.read_text() == "weights"
        assert experts.prepare_experts(Settings(), corpus, tmp_path).cached

    def test_only_old_remains_are_removed(self, corpus, tmp_path, trained):
        for name, age in (("old", 7200), ("new", 60)):
            folder = tmp_path / f"{experts.PARTIAL}{name}"
            folder.mkdir()
            moment = folder.stat().st_mtime - age
            os.utime(folder, (moment, moment))
        experts.prepare_experts(Settings(), corpus, tmp_path)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {
            f"{experts.PARTIAL}new",
            experts.cache_key(Settings(), corpus),
        }

    def test_a_seed_gives_the_same_weights_again(self, tour, corpus, tmp_path):
        first = experts.prepare_experts(tiny(STEPS), corpus, tour[2])
        threads = torch.get_num_threads()
        for domain, recipe in tiny(STEPS).recipes().items():
            text, folder = corpus.text(domain), tmp_path / domain
            losses = train_to_folder(domain, text, recipe, 0, folder, 0)
            assert losses == first.losses[domain]
            files = [f / "model.safetensors" for f in (first.folders[domain], folder)]
            assert files[0].read_bytes() == files[1].read_bytes()
        torch.set_num_threads(threads)


class Page(HTMLParser):
    """Text, tags, and every attribute of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.tags, self.values = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.values += [value or "" for _, value in attrs]

    def handle_data(self, data):
        self.words.append(data)


class TestReport:
    def test_every_system_is_measured(self, tour):
        rows = {row["name"]: row for row in tour[0]["rows"]}
        assert list(rows) == [
            "prose model",
            "code model",
            "average of both",
            "fused model",
            "budget 1",
            "budget 0.7",
            "budget 0.5",
            "exact attention",
            "sparse attention",
            "in a worker",
        ]
        assert rows["fused model"]["parameters"] == (
            rows["prose model"]["parameters"] + rows["code model"]["parameters"]
        )
        assert rows["fused model"]["milliseconds"] > rows["code model"]["milliseconds"]
        assert rows["average of both"]["milliseconds"] is None
        assert rows["fused model"]["cache_bytes"] > sum(
            rows[f"{domain} model"]["cache_bytes"] for domain in DOMAINS
        )

    def test_a_family_of_budgets(self, tour):
        rows = {row["name"]: row for row in tour[0]["rows"]}
        dense, full = rows["fused model"], rows["budget 1"]
        assert full["bits"] == dense["bits"]
        assert full["parameters"] == dense["parameters"]
        assert dense["parameters"] > rows["budget 0.7"]["parameters"]
        assert rows["budget 0.7"]["parameters"] > rows["budget 0.5"]["parameters"]
        bits, equal, work = tour[0]["checks"][3:6]
        assert "1.03 at 0.7" in bits["promised"]
        assert equal["kept"], equal
        assert work["kept"], work
        curve = next(e for e in tour[0]["exhibits"] if "budget" in e["title"])
        assert [x for x, _ in curve["series"]["code"]] == list(loraven_row.LEVELS)

    def test_other_attention_predicts_the_same(self, tour):
        rows = {row["name"]: row for row in tour[0]["rows"]}
        here, exact = rows["fused model"], rows["exact attention"]
        assert exact["bits"] == pytest.approx(here["bits"], abs=1e-4)
        assert exact["cache_bytes"] == here["cache_bytes"]
        assert rows["sparse attention"]["bits"] != here["bits"]
        checks = tour[0]["checks"][6:9]
        assert [check["kept"] for check in checks] == [True] * 3, checks
        assert "blockwise attention" in checks[0]["promised"]

    def test_a_worker_predicts_the_same(self, tour):
        rows = {row["name"]: row for row in tour[0]["rows"]}
        here, there = rows["fused model"], rows["in a worker"]
        for name in ("bits", "bits_per_byte", "parameters", "cache_bytes"):
            assert there[name] == here[name]
        checks = tour[0]["checks"][9:]
        assert [check["kept"] for check in checks] == [True] * 4, checks
        assert f"this one is {os.getpid()}" in checks[0]["measured"]
        assert get_all_machines() == []

    def test_a_headline_is_not_the_worker(self, tour):
        text = " ".join(Page(report.render(tour[0])).words)
        best = min(
            (row for row in tour[0]["rows"] if row["time_change"]),
            key=lambda row: row["bits"]["mean"],
        )
        assert best["name"] != "in a worker"
        assert f"bits per character of the {best['name']} against" in text

    def test_fused_is_exact_and_bounded(self, tour):
        gain, bound, alone = tour[0]["checks"][:3]
        assert bound["kept"], bound
        assert alone["kept"], alone
        assert gain["seed"] == 0

    def test_json_is_what_the_run_returned(self, tour):
        written = json.loads((tour[1] / "report.json").read_text(encoding="utf-8"))
        assert written == json.loads(json.dumps(tour[0]))

    @pytest.mark.critical
    def test_page_needs_nothing_from_outside(self, tour):
        page = Page((tour[1] / "report.html").read_text(encoding="utf-8"))
        assert not page.tags & {
            "script",
            "link",
            "img",
            "iframe",
            "object",
            "a",
            "base",
        }
        assert not [value for value in page.values if "//" in value]
        style = report.STYLE.read_text(encoding="utf-8")
        assert "url(" not in style
        assert "@import" not in style

    def test_page_shows_every_figure(self, tour):
        shown = " ".join(Page((tour[1] / "report.html").read_text("utf-8")).words)
        for row in tour[0]["rows"]:
            for cell in table.cells(row):
                assert cell in shown
            assert row["about"] in shown
        for check in tour[0]["checks"]:
            assert check["promised"] in shown
            assert check["measured"] in shown
        assert figures.machine_line(tour[0]) in shown
        for sizes in tour[0]["texts"].values():
            assert f"{sizes['held_out_bytes']:,}" in shown
        for exhibit in tour[0]["exhibits"]:
            assert exhibit["title"] in shown
            assert exhibit["caption"] in shown

    def test_text_of_the_model_is_escaped(self, tour):
        figures_of_run = json.loads(json.dumps(tour[0]))
        shaded = [e for e in figures_of_run["exhibits"] if e["kind"] == "Shaded"]
        shaded[-1]["texts"] = [[["<script>&", 0.5]]]
        text = report.render(figures_of_run)
        assert "script" not in Page(text).tags
        assert "&lt;script&gt;&amp;" in text

    def test_seeds_are_shown(self, tour, capsys):
        figures_of_run = json.loads(json.dumps(tour[0]))
        figures_of_run["seeds"].append(figures_of_run["seeds"][0] | {"seed": 1})
        assert "<h2>Seeds</h2>" in report.render(figures_of_run)
        table.print_seeds(figures_of_run)
        assert "fused model" in capsys.readouterr().out


class TestCommand:
    def start(self, *options: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "tools.tour", *options],
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def test_end_to_end(self, tour, tmp_path):
        cache, out = str(tour[2]), str(tmp_path)
        done = self.start(
            "--steps", str(STEPS), "--windows", "4", "--cache", cache, "--out", out
        )
        kept = "not kept" not in done.stdout
        assert done.returncode == (0 if kept else 1), done.stderr
        assert "fused model" in done.stdout
        assert "taken from the cache" in done.stdout
        assert (tmp_path / "report.html").is_file()

    def test_a_missing_package_is_named(self, tmp_path):
        (tmp_path / "mol.py").write_text("raise ModuleNotFoundError(name='mol')")
        paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        done = self.start(PYTHONPATH=paths)
        assert done.returncode == 2
        assert "needs 'mol', which is not installed" in done.stderr

    def test_senseless_options_are_refused(self, capsys):
        with pytest.raises(SystemExit) as stop:
            run.main(["--seeds", "0"])
        assert stop.value.code == 2
        assert "--seeds is 0" in capsys.readouterr().err
