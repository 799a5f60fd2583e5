"""Policies as text: what is read, what is refused, and that text and policy say the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditrim.plugins.errors import UsageError
from ditrim.runtime.caches.step_cache import StepCache, TeaCache
from ditrim.runtime.policies.baselines import RandomDrop, ToMeSD
from ditrim.runtime.policies.tokendrop import TokenDrop
from ditrim.runtime.policies.topi import CoverageToPi, ToPi
from ditrim.runtime.policy import FullContext
from ditrim.runtime.policy_text import (
    POLICIES,
    options_of,
    policy_class,
    policy_from_text,
    policy_to_text,
    split_label,
)


@pytest.mark.parametrize(
    ("text", "policy", "cache"),
    [
        ("full", FullContext(), None),
        ("topi", ToPi(), None),
        ("  topi   tau=0.5 interval=4 ", ToPi(tau=0.5, interval=4), None),
        ("topi max-kept=none min-kept=3", ToPi(max_kept=None, min_kept=3), None),
        ("topi budgets=0.5,64", ToPi(budgets=(0.5, 64)), None),
        ("topi is_static=true", ToPi(is_static=True), None),
        (
            "topi score=key-similarity layers=last",
            ToPi(score="key-similarity", layers="last"),
            None,
        ),
        ("coverage tau=1 exponent=0.5", CoverageToPi(tau=1.0, exponent=0.5), None),
        ("random ratio=0.5 seed=3", RandomDrop(policy=ToPi(ratio=0.5), seed=3), None),
        ("tomesd scope=reference", ToMeSD(scope="reference"), None),
        ("tokendrop omega=-0.1 random=yes", TokenDrop(omega=-0.1, random=True), None),
        ("full cache=0.05", FullContext(), StepCache(threshold=0.05)),
        (
            "topi cache=0.05 max_reuses=3 tokens=joint",
            ToPi(),
            StepCache(threshold=0.05, max_reuses=3, tokens="joint"),
        ),
        (
            "full cache=0.1 coefficients=1,-2e-3 measured=0.1,0.5",
            FullContext(),
            TeaCache(threshold=0.1, coefficients=(1.0, -2e-3), measured=(0.1, 0.5)),
        ),
    ],
)
def test_text_gives_the_policy_it_says(text: str, policy: Any, cache: Any) -> None:
    assert policy_from_text(text) == (policy, cache)
    assert policy_from_text(policy_to_text(policy, cache)) == (policy, cache)


@pytest.mark.parametrize("name", POLICIES)
def test_every_name_is_a_policy_whose_defaults_need_no_text(name: str) -> None:
    policy, cache = policy_from_text(name)
    assert type(policy) is policy_class(name)
    assert cache is None
    assert policy_to_text(policy) == name
    assert callable(policy.begin)
    assert all(takes and "typing" not in takes for takes in options_of(name).values())


def test_model_chooses_the_defaults_that_differ_between_models() -> None:
    assert policy_from_text("tokendrop", "flux-kontext").policy.num_full_steps == 2  # type: ignore[attr-defined]
    assert policy_from_text("tokendrop", "qwen-edit").policy.num_full_steps == 4  # type: ignore[attr-defined]
    auto = policy_from_text("auto omega=0.2", "flux-kontext").policy
    assert auto.tokendrop == TokenDrop(model="flux-kontext", omega=0.2)  # type: ignore[attr-defined]
    assert policy_to_text(auto) == "auto omega=0.2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the policy is empty; allowed: full, topi, coverage, random"),
        ("topy", "policy 'topy' is unknown; allowed: full, topi, .*; did you mean topi?"),
        ("topi intervall=1", "policy topi has no option 'intervall'; .*; did you mean interval?"),
        ("full tau=1", "policy full has no option 'tau'; allowed: cache"),
        ("topi tau", "policy 'topi tau': 'tau' is no option; write option=value"),
        ("topi tau=", "'tau=' is no option"),
        ("topi =1", "'=1' is no option"),
        ("topi tau=1 tau=1", "tau is given twice"),
        ("topi max-kept=1 max_kept=2", "max_kept is given twice"),
        ("topi tau=x", "policy topi: tau must be a number, got 'x'"),
        ("topi tau=nan", r"policy 'topi tau=nan': tau must be a number in \[0, 1\], got nan"),
        ("topi tau=2", r"policy 'topi tau=2': tau must be a number in \[0, 1\], got 2.0"),
        ("topi interval=2.5", "policy topi: interval must be a whole number or none, got '2.5'"),
        ("topi interval=0", "interval must be an integer of at least 1, got 0"),
        ("topi max_kept=few", "max_kept must be a whole number or none, got 'few'"),
        ("topi is_static=1", "is_static must be true or false, got '1'"),
        (
            "topi score=best",
            "score must be one of influence, attention, key-similarity, got 'best'",
        ),
        ("topi budgets=1,,2", "budgets must be a number, or several with commas between or none"),
        ("topi _schedule=1", "policy topi has no option '_schedule'"),
        ("tokendrop model=qwen-edit", "policy tokendrop has no option 'model'"),
        ("random policy=topi", "policy random has no option 'policy'; allowed: seed, tau"),
        ("topi ratio=0.5 budgets=0.5", "ratio and budgets both say how many tokens to keep"),
        ("topi cache=-1", "policy 'topi cache=-1': threshold must be a number above 0, got -1.0"),
        ("topi max_reuses=3", "max_reuses is the step cache's: .* with cache=<threshold>"),
        ("full cache=1 measured=0,1", "measured goes with coefficients"),
        ("full cache=1 tea=a.json tokens=joint", "tea=a.json says tokens already; leave it out"),
        ("full cache=1 tea=no.json", "no.json"),
    ],
)
def test_bad_text_names_policy_option_and_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        policy_from_text(text)


def test_labels_stand_before_a_colon() -> None:
    assert split_label("topi tau=0.5") == ("topi tau=0.5", "topi tau=0.5")
    assert split_label(" ToPi,  half : topi  ratio=0.5 ") == ("ToPi, half", "topi ratio=0.5")
    for text in (":topi", "half:", " : "):
        with pytest.raises(UsageError, match=r"give 'policy option=value ...' or 'label: "):
            split_label(text)


def test_policy_without_a_name_is_not_written() -> None:
    with pytest.raises(UsageError, match="Nameless is no policy that can be written as text"):
        policy_to_text(type("Nameless", (), {})())


shares = st.floats(0, 1)
topi_options = st.fixed_dictionaries(
    {
        "tau": shares,
        "interval": st.integers(1, 100),
        "warmup": st.integers(0, 9),
        "score_every": st.integers(1, 9),
        "min_kept": st.integers(1, 5),
        "max_kept": st.none() | st.integers(5, 10**9),
        "is_static": st.booleans(),
        "score": st.sampled_from(["influence", "attention", "key-similarity"]),
        "layers": st.sampled_from(["calibrated", "random", "first", "last", "all"]),
        "mode": st.sampled_from(["prune", "merge"]),
        "seed": st.integers(0, 2**40),
    }
)
amounts = st.one_of(
    st.fixed_dictionaries({"ratio": shares}),
    st.fixed_dictionaries(
        {"budgets": st.lists(shares | st.integers(1, 999), min_size=1, max_size=3).map(tuple)}
    ),
    st.just({}),
)
caches = st.none() | st.builds(
    StepCache,
    threshold=st.floats(1e-9, 1e9),
    max_reuses=st.none() | st.integers(1, 50),
    tokens=st.sampled_from(["noisy", "joint"]),
)


@given(
    options=topi_options,
    amount=amounts,
    cls=st.sampled_from([ToPi, CoverageToPi]),
    seed=st.none() | st.integers(0, 99),
    cache=caches,
)
def test_text_of_any_policy_gives_it_back(
    options: dict[str, Any], amount: dict[str, Any], cls: type[ToPi], seed: int | None, cache: Any
) -> None:
    policy: Any = cls(**options, **amount)
    if seed is not None:  # what `random` takes is a ToPi, whose own seed it covers
        pruned = options | {"seed": 0, "mode": "prune"}
        policy = RandomDrop(policy=ToPi(**pruned, **amount), seed=seed)
    assert policy_from_text(policy_to_text(policy, cache)) == (policy, cache)
