"""TokenCache against itself: layouts and splits by hand, equal cost by construction, statistics by hand, and the command."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIG, SIGNATURE, make_plan, vp_sampler

from tc_lightning.cli import main
from tc_lightning.errors import PlanError, RunError
from tc_lightning.measure.scores import Scores, sampler_digest
from tc_lightning.models.checkpoints import save_teacher
from tc_lightning.models.content_predictor import ContentPredictor, RandomPredictor, Selector
from tc_lightning.models.dit import DiT, DiTConfig, randomise_
from tc_lightning.plan.costs import full_step_macs, plan_macs, selector_macs
from tc_lightning.plan.guidance import Guidance
from tc_lightning.plan.segments import Segment, compute, skip
from tc_lightning.runs.ablation.equal_cost import EqualCost, blocks_computed, without_predictor
from tc_lightning.runs.ablation.summary import QUESTIONS, SeedErrors, all_answers, all_rows, table
from tc_lightning.runs.ablation.training import Training
from tc_lightning.runs.ablation.variants import EQUAL, Learned, Variant, all_variants, require_equal_cost
from tc_lightning.runs.folder import find_run

CONFIGS = Path(__file__).parents[1] / "lightning_configs"
STEPS, L, N = 8, 4, 16
SAMPLER = vp_sampler("ddim", STEPS)
LAYOUT = EqualCost(SIGNATURE, SAMPLER, Guidance(1.5, 3), full=4, block_share=0.5)


def make_scores(importance_TLN: np.ndarray, selector: str = "") -> Scores:
    """Blocks matter in the order 2, 1, 3, 0."""
    importance, sensitivity = importance_TLN.copy(), np.tile(np.array([1.0, 3.0, 4.0, 2.0])[:, None], (STEPS, 1, 2))
    importance[0], sensitivity[0] = 1.0, 0.0
    return Scores(importance, sensitivity, SIGNATURE.teacher, sampler_digest(SAMPLER), selector=selector)


@pytest.fixture(scope="module")
def learned() -> Learned:
    rng = np.random.default_rng(0)
    selector = Selector.of(ContentPredictor(CONFIG))
    v2 = rng.uniform(0, 0.9, (STEPS, L, N))
    v2[:, 3] = 1.0  # the last block is uncached
    return Learned(make_scores(rng.random((STEPS, L, N))), make_scores(v2, selector.digest), selector)


@pytest.fixture(scope="module")
def variants(learned: Learned) -> dict[str, Variant]:
    return {v.name: v for v in all_variants(LAYOUT, CONFIG, learned, seed=1, draws=1)}


def keeps(segments: tuple[Segment, ...]) -> list[int]:
    """Tokens that a step recomputes in each block."""
    full = {"compute": N, "skip": 0}
    return [full.get(s.mode, s.keep) for s in segments for _ in s.blocks]


@pytest.mark.parametrize(
    ("blocks", "segments"),
    [
        ([], (skip(0, 4, 1),)),
        ([2, 0], (compute(0, 1), skip(1, 2, 1), compute(2, 3), skip(3, 4, 1))),
        ([1, 2], (skip(0, 1, 1), compute(1, 2), compute(2, 3), skip(3, 4, 1))),
        ([0, 1, 2, 3], tuple(compute(b, b + 1) for b in range(4))),
    ],
)
def test_blocks_computed_by_hand(blocks: list[int], segments: tuple[Segment, ...]) -> None:
    assert blocks_computed(blocks, 4, 1) == segments


def test_layout_by_hand() -> None:
    assert LAYOUT.full_steps == (0, 1, 2, 7)
    assert LAYOUT.pruned == [3, 4, 5, 6]
    assert (LAYOUT.keep, LAYOUT.width, LAYOUT.count) == (4, 4, 2)
    cheap, dear = plan_macs(LAYOUT.plan("", lambda i: (skip(0, L),))) - 4 * full_step_macs(SIGNATURE), full_step_macs(SIGNATURE)
    assert LAYOUT.full_steps_for(5.0 * dear + 0.75 * cheap) == (0, 1, 2, 4, 7)  # a quarter of `cheap` is a skipped step


@pytest.mark.parametrize("changes", [{"full": 0}, {"full": STEPS}, {"token_share": 0.0}, {"block_share": 1.1}])
def test_layout_refuses(changes: dict[str, float]) -> None:
    with pytest.raises(PlanError, match=r"full|shares"):
        dataclasses.replace(LAYOUT, **changes)


def test_plans_of_a_group_cost_the_same_to_the_last_mac(variants: dict[str, Variant]) -> None:
    for group in ("tokens", "blocks"):
        assert len({without_predictor(v.plan) for v in variants.values() if v.group == group}) == 1
    extra = plan_macs(variants["v2"].plan) - plan_macs(variants["v1"].plan)
    assert extra == pytest.approx(len(LAYOUT.pruned) * selector_macs(SIGNATURE) / 2)  # one run for both halves of guidance
    tokens, instead = (without_predictor(variants[name].plan) for name in ("v1", "full steps instead"))
    assert tokens - full_step_macs(SIGNATURE) < instead <= tokens


def test_every_question_is_about_variants_that_there_are(variants: dict[str, Variant]) -> None:
    for _, first, second in QUESTIONS:
        assert variants[first].group == variants[second].group


def test_which_tokens(variants: dict[str, Variant], learned: Learned) -> None:
    for i in LAYOUT.pruned:
        best = set(np.argsort(-learned.v1.importance_TLN[i].mean(0))[:4].tolist())
        assert set(variants["v1"].plan.steps[i][0].tokens) == best
        assert variants["v2"].plan.steps[i][0].is_content
    fixed = {variants["random, one set for all steps"].plan.steps[i] for i in LAYOUT.pruned}
    assert len(fixed) == 1
    assert len({variants["random"].plan.steps[i] for i in LAYOUT.pruned}) > 1


def test_splits_over_blocks(variants: dict[str, Variant], learned: Learned) -> None:
    assert keeps(variants["v2 by block, even split"].plan.steps[3]) == [4, 4, 4, 4]
    assert keeps(variants["v2 by block, own split"].plan.steps[3]) == [0, 0, 0, 16]  # all that there is goes to the uncached block
    wide = {v.name: v for v in all_variants(dataclasses.replace(LAYOUT, token_share=0.5), CONFIG, learned, 1, 1)}
    assert keeps(wide["v2 by block, even but for the last"].plan.steps[3]) == [6, 5, 5, 16]
    mean_LN = learned.v1.importance_TLN[LAYOUT.pruned].mean(0)
    top = np.sort(mean_LN, axis=None)[-32]
    assert keeps(wide["v1 by block, own split"].plan.steps[3]) == (mean_LN >= top).sum(1).tolist()
    assert keeps(wide["random by block, v2's split"].plan.steps[3]) == keeps(wide["v2 by block, own split"].plan.steps[3])


def test_a_window_holds_the_tokens(learned: Learned) -> None:
    half = {v.name: v for v in all_variants(dataclasses.replace(LAYOUT, window_share=0.5), CONFIG, learned, 1, 1)}
    for name in ("v1", "v2", "random", "random for each image", "v1 by block, even split"):
        assert keeps(half[name].plan.steps[3]) == [0, 4, 4, 0]
    assert sum(keeps(half["v1 by block, own split"].plan.steps[3])) == 8


def test_which_blocks(variants: dict[str, Variant]) -> None:
    computed = {name: [b for b, keep in enumerate(keeps(v.plan.steps[4])) if keep] for name, v in variants.items()}
    assert computed["sensitive blocks"] == computed["sensitive window"] == [1, 2]
    assert computed["sensitive edges"] == [2, 3]
    assert computed["least sensitive blocks"] == [0, 3]
    assert computed["evenly spaced blocks"] == [1, 3]
    assert all(len(computed[name]) == 2 for name in ("random edges", "random window", "random blocks", "v1's blocks"))


def test_unequal_cost_is_refused() -> None:
    plans = [make_plan(SIGNATURE, ((compute(0, 4),),) * 2 + (step,)) for step in ((skip(0, 4),), (compute(0, 1), skip(1, 4)))]
    assert without_predictor(plans[1]) > without_predictor(plans[0]) * (1 + EQUAL)
    with pytest.raises(PlanError, match="'dear' and 'cheap'"):
        require_equal_cost([Variant("tokens", "cheap", plans[0]), Variant("tokens", "dear", plans[1])])
    require_equal_cost([Variant("tokens", "cheap", plans[0]), Variant("blocks", "dear", plans[1])])


def test_random_scores_differ_by_image_block_and_call_but_not_by_run() -> None:
    first, again = (RandomPredictor(CONFIG, [3, 0]) for _ in range(2))
    z, mod = torch.zeros(2, N, CONFIG.hidden_size), first.modulation(DiT(CONFIG), torch.zeros(2))
    a, b = first(z, mod), first(z, mod)
    assert len(torch.cat([a, b]).flatten().unique()) == 4 * L * N
    assert torch.equal(again(z, mod), a)


def make_measured(values: dict[str, list[float]]) -> SeedErrors:
    names = {name for _, *pair in QUESTIONS for name in pair}
    rest = {name: {"group": "tokens", "speedup": 2.0, "speedup_with_predictor": 1.9, "mse": [1.0, 1.0]} for name in names}
    return rest | {name: rest[name] | {"mse": mse} for name, mse in values.items()}


def test_statistics_by_hand() -> None:
    seeds = [make_measured({"v1": [1.0, 2.0], "random": [2.0, 5.0]}), make_measured({"v1": [1.0, 4.0], "random": [4.0, 5.0]})]
    rows = {row.name: row for row in all_rows(seeds)}
    assert (rows["v1"].mse, rows["v1"].std) == pytest.approx((2.0, np.sqrt(0.5)))
    answer = all_answers(seeds)[0]  # differences: -1, -3 and -3, -1
    assert (answer.first, answer.second, answer.ratio, answer.difference) == ("v1", "random", 0.5, -2.0)
    assert (answer.se_seeds, answer.se_images) == (0.0, 0.0)
    assert answer.verdict == "better"
    told = table(list(rows.values()), [answer], 2)
    assert "| v1 | 2 ± 0.7 | 2.00x | 1.90x |" in told
    assert "| 0.500 | -2 | 0, 0 | better |" in told


@pytest.mark.parametrize(
    ("seeds", "verdict"),
    [([[2.0, 2.0], [2.0, 3.0]], "worse"), ([[0.5, 2.0], [1.0, 1.0]], "undecided"), ([[1.0, 1.0], [1.0, 1.0]], "undecided")],
)
def test_verdicts(seeds: list[list[float]], verdict: str) -> None:
    assert all_answers([make_measured({"v1": mse}) for mse in seeds])[0].verdict == verdict


TINY = DiTConfig(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=4, num_heads=2, num_classes=2, learn_sigma=False)
OVERLAY = """
model:
  init_args:
    teacher: {weights: tiny.safetensors}
    num_steps: 6
    sensitivity_samples: 1
data: {init_args: {batch_size: 4}}
trainer: {accelerator: cpu, enable_progress_bar: false}
"""


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command on a tiny teacher, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning"])
    Path("tiny.yaml").write_text(OVERLAY, encoding="utf-8")
    save_teacher(randomise_(DiT(TINY), seed=0), Path("tiny.safetensors"))
    sizes = "--seeds 2 --max-steps 2 --train-images 3 --images 2 --draws 1 --full 3 --block-share 0.5"
    return ["ablate", "-c", str(CONFIGS / "digits.yaml"), "-c", "tiny.yaml", "--out", "a.json", *sizes.split()]


def test_the_command_compares_and_goes_on(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments)
    written = Path("a.json").read_text(encoding="utf-8")
    found = json.loads(written)
    assert list(found["seeds"]) == ["0", "1"]
    assert len(found["answers"]) == len(QUESTIONS)
    trained = {path: path.stat().st_mtime_ns for path in Path("runs/ablation").rglob("run.json")}
    assert len(trained) == 4
    with pytest.raises(RunError, match=r"no finished run under .*4 of other purposes"):
        find_run(Path("runs"))  # what is trained to be compared is never taken for the user's run
    scores = [Scores.load(path.with_name("scores.safetensors")) for path in sorted(trained)]
    assert len({s.digest for s in scores}) == 4
    assert [bool(s.selector) for s in scores] == [False, True, False, True]

    del found["seeds"]["1"]  # as if it had been interrupted before the second seed was measured
    Path("a.json").write_text(json.dumps(found), encoding="utf-8")
    capsys.readouterr()
    main(arguments)
    assert "training seed 0: known" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path("runs/ablation").rglob("run.json")} == trained
    assert Path("a.json").read_text(encoding="utf-8") == written

    main([*arguments, "--order", "0", "--out", "b.json"])
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("run.json")} == trained
    assert json.loads(Path("b.json").read_text(encoding="utf-8"))["rows"] != found["rows"]


def test_settings_count_and_comments_do_not(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.yaml" for name in "abc"]
    for file, text in zip(files, ("data: {batch_size: 4}", "# four\ndata:\n  batch_size: 4", "data: {batch_size: 5}"), strict=True):
        file.write_text(text, encoding="utf-8")
    a, b, c = (Training((str(file),)).digest for file in files)
    assert a == b != c
    assert Training((str(files[0]),), steps_v1=7).digest != a


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--seeds", "1"], "2 or more"),
        (["--order", "2"], "other settings"),
        (["--full", "6"], "other settings"),
        (["--token-share", "0"], "share above 0"),
        (["--lr-v2", "nan"], "learning rate above 0"),
        (["-c", "none.yaml"], "no configuration none.yaml"),
    ],
)
def test_the_command_refuses(arguments: list[str], more: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.json").write_text(json.dumps({"settings": {}, "seeds": {}}), encoding="utf-8")
    with pytest.raises(SystemExit):
        main([*arguments, *more])
    assert what in capsys.readouterr().err
