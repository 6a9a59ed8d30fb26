"""Speculative decoding says exactly what plain decoding says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hybrimoe_plugin.errors import BudgetError, FlashError, SpeculationError
from lever_ext.decoding import LeverDecoding
from lever_ext.drafts.language_model import LanguageModelDraft
from lever_ext.drafts.low_bit import LowBitLinear, low_bit_copy
from lever_ext.drafts.ngram import NGramDraft
from lever_ext.drafts.runner import DirectRunner, HostRunner
from lever_ext.early_exit.gate import ExitGate
from lever_ext.early_exit.predictor import ExitPredictor
from lever_ext.early_exit.prune import PruneSettings
from lever_ext.flash.dram_plan import plan_dram
from lever_ext.flash.pack import FlashPack
from lever_ext.flash.reader import Throttle
from lever_ext.speculation.draft_ahead import OverlappedDrafting
from lever_ext.speculation.kept_entries import KeptEntries
from lever_ext.speculation.verify import Verified, Verifier
from lever_ext.target import FlashTarget, load_target
from lever_ext.tree.calibrate import Calibration, Candidates
from lever_ext.tree.candidates import CandidateTree
from lever_ext.tree.policies import POLICIES, FixedBudget, make_policy
from lever_ext.tree.token_tree import TokenTree
from tests.lever.conftest import tiny_config

FAMILY_NAMES = ("llama", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe")
PROMPTS = 20 if "HYBRIMOE_LONG" in os.environ else 10
SHORT = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 8}
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 24}


def prompt(seed: int, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(seed))


def least_budget(path: Path) -> int:
    pack = FlashPack.open(path)
    low, high = 0, plan_dram(pack, None).nbytes
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan_dram(pack, middle)
            high = middle
        except BudgetError:
            low = middle
    pack.close()
    return high


def a_gate(model: Any, layer: int = 2, threshold: float = 0.15) -> ExitGate:
    predictor = ExitPredictor(model.get_output_embeddings().weight.detach(), layer, 0.0, "")
    return ExitGate(predictor, PruneSettings(threshold=threshold, least_nodes=1))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_flash_target_equals_the_plain_model(
    family: str, plain_models: dict[str, Any], packs: dict[str, Path]
) -> None:
    ids = prompt(0, 17)
    with torch.no_grad():
        want = plain_models[family](ids).logits
    whole = None
    for budget in (least_budget(packs[family]), None):
        target = load_target(packs[family], dram_budget=budget)
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(target.model(ids).logits, want)
        whole = target.residency.nbytes
        target.close()
    assert whole is not None and least_budget(packs[family]) < whole


@pytest.fixture(scope="session")
def wanted(plain_models: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    """What plain `generate` says to 20 prompts."""
    return {
        family: [plain_models[family].generate(prompt(seed), **SHORT) for seed in range(20)]
        for family in ("llama", "mixtral")
    }


@pytest.mark.parametrize(
    ("family", "prompts"), [pytest.param("llama", PROMPTS, marks=pytest.mark.slow), ("mixtral", 4)]
)
@pytest.mark.parametrize(
    "draft", ["low-bit", "n-gram", pytest.param("wrong", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("pruning", [False, True])
def test_greedy_output_is_token_identical(
    family: str,
    prompts: int,
    draft: str,
    pruning: bool,
    plain_models: dict[str, Any],
    packs: dict[str, Path],
    wanted: dict[str, list[torch.Tensor]],
) -> None:
    """Every policy on every prompt, with the least memory and with all of it in turns."""
    made = make_draft(draft, plain_models[family])
    kept = rows = 0
    for budget in (least_budget(packs[family]), None):
        target = load_target(packs[family], dram_budget=budget)
        target.set_gate(a_gate(plain_models[family]) if pruning else None)
        for name in POLICIES:
            decoder = LeverDecoding(made, make_policy(name), target, max_nodes=12, prune="always")
            for seed in range(0 if budget else 1, prompts, 2):
                found = target.model.generate(prompt(seed), custom_generate=decoder, **SHORT)
                assert torch.equal(found, wanted[family][seed]), (name, seed)
                cycles = decoder.stats.cycles
                assert decoder.stats.tokens == 8 == 1 + sum(cycle.accepted + 1 for cycle in cycles)
                kept, rows = kept + sum(c.kept for c in cycles), rows + sum(c.nodes for c in cycles)
            decoder.close()
        target.close()
    if draft != "n-gram":
        assert (kept < rows) == pruning


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_drafting_ahead_changes_nothing_that_is_said(
    family: str,
    plain_models: dict[str, Any],
    packs: dict[str, Path],
    wanted: dict[str, list[torch.Tensor]],
) -> None:
    target = load_target(
        packs[family], dram_budget=least_budget(packs[family]), throttle=Throttle.parse("0.01")
    )
    decoder = LeverDecoding(
        make_draft("low-bit", plain_models[family]), make_policy("lever"), target
    )
    decoder.draft_ahead = OverlappedDrafting(decoder.draft, least_wait=0.0, least_us=0.0)
    found = [
        target.model.generate(prompt(seed), custom_generate=decoder, **SHORT) for seed in range(4)
    ]
    assert all(torch.equal(*pair) for pair in zip(found, wanted[family], strict=False))
    assert decoder.draft_ahead.nodes > 20
    with pytest.raises(RuntimeError, match="no draft today"):
        decoder.draft.expand, before = fail_after(2, decoder.draft.expand), decoder.draft.expand
        target.model.generate(prompt(9), custom_generate=decoder, **SHORT)
    decoder.draft.expand = before
    assert torch.equal(
        target.model.generate(prompt(5), custom_generate=decoder, **SHORT), wanted[family][5]
    )
    decoder.close()
    target.close()


def fail_after(calls: int, expand: Any) -> Any:
    left = iter(range(calls))

    def failing(tree: CandidateTree, keys: Sequence[int]) -> list[Candidates]:
        if next(left, None) is None:
            raise RuntimeError("no draft today")
        return expand(tree, keys)

    return failing


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_lean_runner_equals_the_hosts_forward(family: str, plain_models: dict[str, Any]) -> None:
    model, draws = plain_models[family], []
    for runner in (DirectRunner(model), HostRunner(model)):
        draft = LanguageModelDraft(model, runner=runner)
        draft.start(prompt(1)[0, :-1].tolist())
        tree = CandidateTree(int(prompt(1)[0, -1]), Calibration())
        for _ in range(3):
            keys = tree.unexpanded(9, 5)
            found = draft.expand(tree, keys)
            draws += found
            for key, candidates in zip(keys, found, strict=True):
                tree.add(key, candidates)
        path = [tree.root, tree.nodes[tree.root].children[0]]
        tokens = [tree.nodes[key].token for key in path]
        tree.advance(path, tree.nodes[tree.nodes[path[1]].children[0]].token)
        draft.advance(path, tokens, tree)
        draws += draft.expand(tree, tree.unexpanded(9, 3))
    half = len(draws) // 2
    for ours, theirs in zip(draws[:half], draws[half:], strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.probabilities == pytest.approx(theirs.probabilities, rel=1e-4)


def make_draft(name: str, plain: Any) -> Any:
    if name == "n-gram":
        return NGramDraft()
    if name == "wrong":
        torch.manual_seed(5)
        other = low_bit_copy(plain, 2, 32)
        torch.nn.init.normal_(other.get_input_embeddings().weight)
        return LanguageModelDraft(other)
    return LanguageModelDraft(low_bit_copy(plain, 3, 32))


@pytest.mark.slow
def test_twenty_prompts_in_one_conversation(
    plain_models: dict[str, Any], packs: dict[str, Path]
) -> None:
    """The decoder keeps what it learned from prompt to prompt, and follow-ups reuse the
    draft's KV.
    """
    plain = plain_models["llama"]
    target = load_target(packs["llama"], dram_budget=least_budget(packs["llama"]))
    decoder = LeverDecoding(
        LanguageModelDraft(low_bit_copy(plain, 3, 32)), make_policy("lever"), target
    )
    decoder.latency.warm_start([(1, 1, 1e6), (16, 4, 1.2e6)])
    ids = prompt(3)
    for seed in range(20):
        ids = (
            prompt(seed, 5 + seed)
            if seed % 4
            else torch.cat([ids, prompt(seed, 3)], dim=1)[:, :120]
        )
        mask = torch.ones_like(ids)
        want = plain.generate(ids, attention_mask=mask, **GREEDY)
        ids = target.model.generate(ids, attention_mask=mask, custom_generate=decoder, **GREEDY)
        assert torch.equal(ids, want)
    target.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"repetition_penalty": 1.4},
        {
            "temperature": 1.3,
            "top_k": 20,
            "top_p": 0.9,
            "repetition_penalty": 1.1,
            "no_repeat_ngram_size": 3,
        },
    ],
)
def test_sampling_with_a_seed_draws_what_generate_draws(
    options: dict[str, Any], plain_models: dict[str, Any], packs: dict[str, Path]
) -> None:
    plain, settings = (
        plain_models["llama"],
        {"do_sample": True, "max_new_tokens": 20, "top_k": 0, **options},
    )
    target = load_target(packs["llama"])
    target.set_gate(a_gate(plain))
    for seed in range(4):
        torch.manual_seed(seed)
        want = plain.generate(prompt(seed), **settings)
        decoder = LeverDecoding(
            make_draft("low-bit", plain), FixedBudget(12), target, prune="always"
        )
        torch.manual_seed(seed)
        assert torch.equal(
            target.model.generate(prompt(seed), custom_generate=decoder, **settings), want
        )
    target.close()


@pytest.mark.slow
def test_sampled_pairs_follow_the_targets_distribution(
    plain_models: dict[str, Any], packs: dict[str, Path]
) -> None:
    """Chi-square of the third token given the first two, with pruning: conditional on nothing but
    the prompt's path.
    """
    plain = plain_models["llama"]
    target = load_target(packs["llama"])
    target.set_gate(a_gate(plain, threshold=0.3))
    decoder = LeverDecoding(make_draft("low-bit", plain), FixedBudget(10), target, prune="always")
    ids, settings = (
        prompt(11),
        {"do_sample": True, "top_k": 3, "max_new_tokens": 2, "min_new_tokens": 2},
    )
    torch.manual_seed(0)
    counts: dict[tuple[int, int], int] = {}
    draws = 500
    for _ in range(draws):
        pair = tuple(
            target.model.generate(ids, custom_generate=decoder, **settings)[0, -2:].tolist()
        )
        counts[pair] = counts.get(pair, 0) + 1
    expected = exact_pairs(plain, ids)
    assert set(counts) <= set(expected)
    pairs = sorted(expected)
    drawn, wanted = ([values.get(pair, 0.0) for pair in pairs] for values in (counts, expected))
    assert chi_square_p(drawn, [share * draws for share in wanted]) > 1e-3
    target.close()


def chi_square_p(counts: Sequence[float], expected: Sequence[float]) -> float:
    """Chance of a chi-square statistic at least as large as that of the counts."""
    statistic = sum(
        (count - want) ** 2 / want for count, want in zip(counts, expected, strict=True)
    )
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def exact_pairs(plain: Any, ids: torch.Tensor) -> dict[tuple[int, int], float]:
    """Probability of every pair of tokens under top-k 3 and no end token."""

    def top(prefix: torch.Tensor) -> dict[int, float]:
        with torch.no_grad():
            logits = plain(prefix).logits[0, -1].clone()
        logits[2] = -torch.inf
        values, tokens = logits.topk(3)
        return dict(zip(tokens.tolist(), torch.softmax(values, 0).tolist(), strict=True))

    pairs = {}
    for first, share in top(ids).items():
        for second, then in top(torch.cat([ids, torch.tensor([[first]])], 1)).items():
            pairs[first, second] = share * then
    return pairs


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_compacted_cache_equals_recomputation(family: str, plain_models: dict[str, Any]) -> None:
    model, ids = plain_models[family], prompt(4)
    verifier, cache = Verifier(model), DynamicCache(config=model.config)
    verifier.prefill(ids[:, :-1], cache)
    tree = TokenTree(
        (int(ids[0, -1]), 5, 6, 7, 8, 9), (-1, 0, 0, 2, 2, 4), (1.0,) * 6, tuple(range(6))
    )
    verified = verifier.verify(tree, cache)
    path = [0, 2, 4, 5]
    plain = torch.cat([ids, torch.tensor([[6, 8, 9]])], 1)
    again = DynamicCache(config=model.config)
    with torch.no_grad():
        want = model.base_model(
            plain, use_cache=True, **{verifier.cache_name: again}
        ).last_hidden_state
    torch.testing.assert_close(verified.hidden[0, path], want[0, -4:])
    keep_path(verifier, cache, verified, path)
    for ours, theirs in zip(cache.layers, again.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)


def keep_path(
    verifier: Verifier, cache: DynamicCache, verified: Verified, path: Sequence[int]
) -> None:
    kept = KeptEntries(cache)
    for depth, row in enumerate(path):
        verifier.place(cache, verified, row, depth)
        kept.keep(verified.past + depth + 1)
    kept.drop_rest()


def test_pruned_rows_leave_no_trace_in_the_cache(
    plain_models: dict[str, Any], packs: dict[str, Path]
) -> None:
    target = load_target(packs["llama"])
    gate = a_gate(plain_models["llama"], threshold=0.9)
    target.set_gate(gate)
    verifier, cache, ids = (
        Verifier(target.model, gate),
        DynamicCache(config=target.model.config),
        prompt(4),
    )
    verifier.prefill(ids[:, :-1], cache)
    tree = TokenTree(
        (int(ids[0, -1]), 5, 6, 7, 8, 9), (-1, 0, 0, 1, 2, 4), (1.0,) * 6, tuple(range(6))
    )
    verified = verifier.verify(tree, cache, [[5, 6, 30], [7], [8], [], [9], []])
    assert 0 < len(verified.row_of) < 6
    path = tree.path(max(verified.row_of))
    keep_path(verifier, cache, verified, path)
    again = DynamicCache(config=target.model.config)
    whole = torch.cat([ids[:, :-1], torch.tensor([[tree.tokens[row] for row in path]])], 1)
    Verifier(plain_models["llama"]).prefill(whole, again)
    for ours, theirs in zip(cache.layers, again.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
    target.close()


@pytest.mark.parametrize(
    "stop", [{"max_new_tokens": 1}, {"max_new_tokens": 7}, {"eos_token_id": [9, 40, 24]}]
)
def test_stopping_is_generates_own(stop: dict[str, Any], plain_models: dict[str, Any]) -> None:
    plain = plain_models["llama"]
    settings = {"do_sample": False, "max_new_tokens": 30, **stop}
    decoder = LeverDecoding(make_draft("low-bit", plain), FixedBudget(12))
    assert torch.equal(
        plain.generate(prompt(1), custom_generate=decoder, **settings),
        plain.generate(prompt(1), **settings),
    )


def test_dict_output_and_streamer(plain_models: dict[str, Any]) -> None:
    plain, seen = plain_models["llama"], list[int]()

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            seen.extend(value.tolist())

        def end(self) -> None:
            seen.append(-1)

    extra = {"return_dict_in_generate": True, "output_scores": True}
    decoder = LeverDecoding(make_draft("low-bit", plain), FixedBudget(12), streamer=Streamer())
    ours = plain.generate(prompt(1), custom_generate=decoder, **GREEDY, **extra)
    theirs = plain.generate(prompt(1), **GREEDY, **extra)
    assert (
        torch.equal(ours.sequences, theirs.sequences)
        and len(ours.scores) == len(theirs.scores) == 24
    )
    torch.testing.assert_close(ours.scores[-1], theirs.scores[-1])
    assert seen == [*theirs.sequences[0, 9:].tolist(), -1]


def test_what_speculation_cannot_do_is_refused(plain_models: dict[str, Any]) -> None:
    plain = plain_models["llama"]
    decoder = LeverDecoding(make_draft("low-bit", plain), make_policy("lever"))
    with pytest.raises(SpeculationError, match="one sequence"):
        plain.generate(prompt(0).repeat(2, 1), custom_generate=decoder, **GREEDY)
    with pytest.raises(SpeculationError, match="padding"):
        mask = torch.tensor([[0] + [1] * 8])
        plain.generate(prompt(0), attention_mask=mask, custom_generate=decoder, **GREEDY)
    with pytest.raises(SpeculationError, match="needs a draft"):
        LeverDecoding(None, make_policy("lever"))


def test_a_draft_at_the_end_of_its_context_falls_silent(plain_models: dict[str, Any]) -> None:
    plain = plain_models["llama"]
    draft = make_draft("low-bit", plain)
    draft.context = 16
    decoder = LeverDecoding(draft, FixedBudget(6))
    assert torch.equal(
        plain.generate(prompt(1), custom_generate=decoder, **GREEDY),
        plain.generate(prompt(1), **GREEDY),
    )
    assert decoder.stats.cycles[0].nodes > 1 == decoder.stats.cycles[-1].nodes


@pytest.mark.parametrize(("vocabulary", "first"), [(40, 3), (40, 50), (64, 3), (200, 3), (576, 3)])
def test_a_draft_with_more_or_fewer_rows_of_padding(
    vocabulary: int, first: int, plain_models: dict[str, Any], packs: dict[str, Path]
) -> None:
    """It likes its last token best, and the text holds tokens that the smallest draft lacks from
    some place on.
    """
    target, draft = load_target(packs["llama"]), a_draft_of(vocabulary)
    decoder = LeverDecoding(draft, FixedBudget(6), target)
    ids = torch.cat([prompt(1)[:, 1:] % 30 + 3, torch.tensor([[first]])], 1)
    want = plain_models["llama"].generate(ids, **GREEDY)
    assert torch.equal(target.model.generate(ids, custom_generate=decoder, **GREEDY), want)
    assert (decoder.stats.cycles[0].nodes > 1) == (first < vocabulary)
    decoder.close()
    target.close()


@pytest.mark.parametrize("vocabulary", [577, 1000])
def test_a_draft_with_another_vocabulary_is_refused(
    vocabulary: int, plain_models: dict[str, Any], packs: dict[str, Path]
) -> None:
    target, draft = load_target(packs["llama"]), a_draft_of(vocabulary)
    decoder = LeverDecoding(draft, make_policy("lever"), target)
    with pytest.raises(
        SpeculationError, match=rf"vocabulary of {vocabulary} tokens and the target one of 64"
    ):
        target.model.generate(prompt(0), custom_generate=decoder, **GREEDY)
    target.close()


def a_draft_of(vocabulary: int) -> LanguageModelDraft:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**tiny_config("llama"), "vocab_size": vocabulary})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(
        torch.arange(vocabulary, dtype=torch.float32), requires_grad=False
    )
    return LanguageModelDraft(model)


def test_draft_equals_recomputation_after_it_was_advanced(plain_models: dict[str, Any]) -> None:
    model, ids = plain_models["llama"], prompt(2)[0].tolist()
    draft = LanguageModelDraft(model, candidates=3)
    draft.start(ids[:-1])
    tree = CandidateTree(ids[-1], Calibration())

    def expand(keys: Sequence[int]) -> None:
        for key, found in zip(keys, draft.expand(tree, keys), strict=True):
            tree.add(key, found)

    def check(key: int, before: Sequence[int]) -> None:
        text = [*before, *(tree.nodes[above].token for above in tree.path(key))]
        with torch.no_grad():
            shares = torch.softmax(model(torch.tensor([text])).logits[0, -1], dim=-1)
        found = tree.nodes[key].candidates
        assert found is not None
        torch.testing.assert_close(torch.tensor(found.probabilities), shares.topk(3).values)

    expand([tree.root])
    first = list(tree.nodes[tree.root].children)
    expand(first[:2])
    second = tree.nodes[first[1]].children
    expand(second[:1])
    for key in (tree.root, first[0], first[1], second[0]):
        check(key, ids[:-1])
    # The target goes to first[1], whose drafted children survive.
    root = tree.root
    tree.advance([root], tree.nodes[first[1]].token)
    draft.advance([root], [ids[-1]], tree)
    expand(second[1:2])
    check(second[1], ids)
    # And then somewhere that was not drafted.
    path, tokens = (
        [tree.root, second[2]],
        [tree.nodes[tree.root].token, tree.nodes[second[2]].token],
    )
    tree.advance(path, 33)
    draft.advance(path, tokens, tree)
    expand([tree.root])
    check(tree.root, [*ids, *tokens])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_low_bit_kernel_equals_its_plain_twin(bits: int) -> None:
    torch.manual_seed(bits)
    weight, value = torch.randn(48, 64), torch.randn(5, 64)
    twin = LowBitLinear(weight, None, bits, 32, torch.float32)
    kernel = LowBitLinear(weight, None, bits, 32, torch.bfloat16)
    assert kernel.kernel and not twin.kernel
    want, got = twin(value), kernel(value.bfloat16()).float()
    assert (got - want).norm() / want.norm() < 0.01  # bfloat16 inputs, scales and outputs
    steps = (twin.dequantized() - weight).abs().view(48, 2, 32).amax(-1)
    width = (weight.view(48, 2, 32).amax(-1) - weight.view(48, 2, 32).amin(-1)) / (2**bits - 1)
    assert bool((steps <= width / 2 + 1e-5).all())


def test_ngram_proposes_what_followed_before() -> None:
    draft = NGramDraft()
    draft.start([1, 2, 3, 9, 1, 2, 3, 4, 1, 2])
    tree = CandidateTree(3, Calibration())
    (found,) = draft.expand(tree, [tree.root])
    assert set(found.tokens) == {9, 4}
    tree.add(tree.root, Candidates((9,), (1.0,)))
    (after,) = draft.expand(tree, tree.nodes[tree.root].children)
    assert after.tokens[0] == 1


def test_foreign_and_missing_rules(packs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="is too small"):
        load_target(packs["llama"], dram_budget="1KiB")
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        '- match: {name: "^model\\\\.layers\\\\.0$"}\n'
        "  replace: {class: lever_ext.operators.decoder.FlashDecoderLayer, kwargs: {}}\n"
    )
    with pytest.raises(FlashError, match="nothing in the pack or the rules"):
        load_target(packs["llama"], rules=rules)


def test_target_survives_a_pass_that_was_cut_off(
    plain_models: dict[str, Any], packs: dict[str, Path]
) -> None:
    target: FlashTarget = load_target(packs["llama"], dram_budget=least_budget(packs["llama"]))

    class Interrupt(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Interrupt

    layer = target.model.model.layers[2]
    hook = layer.layer.mlp.register_forward_hook(stop)
    with pytest.raises(Interrupt):
        target.model.generate(prompt(0), **GREEDY)
    hook.remove()
    assert torch.equal(
        target.model.generate(prompt(0), **GREEDY),
        plain_models["llama"].generate(prompt(0), **GREEDY),
    )
    target.close()
