"""Whatever is written as options, passes or a command: a configuration, or an error that helps."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import memopt
from memopt.backend import PASSES, cache_key, read_options
from memopt.cli.asked import function_of, lengths_of, number_of, options_of
from memopt.config import Config
from memopt.errors import ConfigError, MemoptError
from tests.graphs import assert_same, lowered, seeded, square

NAMES = [*Config.__dataclass_fields__, "budget", ""]
OWN = {p.name: [*vars(p)] for p in PASSES}
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.builds(lambda sign: sign * 10**5000, st.sampled_from([-1, 1]))  # has no repr
    | st.sampled_from([0, 1, "min", "eager", "6GiB", "exact", "cpu", "\udcff", "\0"])
)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3)
)
PASS_OPTIONS = st.sampled_from(sorted(OWN)).flatmap(
    lambda name: st.tuples(
        st.just(name), SCALARS | st.dictionaries(st.sampled_from([*OWN[name], "x"]), VALUES)
    )
)
OPTIONS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3)


def assert_read_or_refused(options: Any) -> None:
    """There is a configuration with a key of its own, or an error that says what is allowed."""
    try:
        config = read_options(options)
    except MemoptError as error:
        message = str(error)
        assert any(word in message for word in ("allowed", "known", "plan", "must")), message
        assert len(message) < 3000 + 40 * len(torch._inductor.config.get_config_copy())
    else:
        assert isinstance(cache_key(config, 0, None), str)


@settings(max_examples=300)
@given(OPTIONS | VALUES)
def test_any_options_are_read_or_refused(options: object) -> None:
    assert_read_or_refused(options)


@settings(max_examples=300)
@given(st.lists(PASS_OPTIONS, max_size=3).map(dict))
def test_any_options_of_passes_are_read_or_refused(passes: Mapping[str, object]) -> None:
    assert_read_or_refused({"passes": passes})


@pytest.mark.parametrize("name", sorted(name for name, own in OWN.items() if own))
@pytest.mark.parametrize(
    "value", [None, "x", -1, -0.5, [3], {"a": 1}, pytest.param(10**5000, id="huge"), True, 0]
)
def test_an_option_of_a_pass_has_the_type_of_its_field(name: str, value: object) -> None:
    for option in OWN[name]:
        assert_read_or_refused({"passes": {name: {option: value}}})


@pytest.mark.parametrize(
    ("pass_name", "option", "value", "allowed"),
    [
        ("pack_masks", "least", "many", "a whole number from 0 on"),
        ("pack_masks", "least", True, "a whole number from 0 on"),
        ("pack_masks", "cpu", 1, "True or False"),
        ("offload", "least", "1MiB", "a whole number from 0 on"),
        ("offload", "bandwidth", "fast", "a number from 0 on or None"),
        ("tune_norms", "most", -2, "a number from 0 on"),
        ("chunk_losses", "chunk_rows", True, "a whole number from 0 on"),
        ("chunk_losses", "logits", None, "a string"),
        ("cut_rows", "most", 2.0, "a whole number from 0 on"),
        ("compress", "bits", "8", "a whole number from 0 on"),
    ],
)
def test_the_error_names_the_option_the_value_and_what_is_allowed(
    pass_name: str, option: str, value: object, allowed: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_options({"passes": {pass_name: {option: value}}})
    said = f"option {option!r} of pass {pass_name!r} = {value!r}: allowed is {allowed}"
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("patches", "said"),
    [
        ({"max_autotun": True}, "did you mean 'max_autotune'?"),
        ({"max_autotune": "yes"}, "allowed is a bool, such as False"),
        ({"triton.cudagraphs": 3}, "allowed is a bool"),
    ],
)
def test_patches_to_inductor_are_checked_before_anything_is_compiled(
    patches: object, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_options({"inductor": patches})
    assert said in str(caught.value)


def test_patches_to_inductor_are_read() -> None:
    patches = {"max_autotune": False, "triton.cudagraphs": False, "max_fusion_size": 8}
    assert read_options({"inductor": patches}).inductor.to_dict() == patches


def test_a_container_that_holds_itself_is_refused() -> None:
    inside: dict[str, object] = {}
    inside["again"] = [inside]
    for name in ("inductor", "passes"):
        with pytest.raises(ConfigError, match="nested deeper"):
            read_options({name: {"cut_rows": inside}})


@pytest.mark.parametrize("name", sorted(name for name, own in OWN.items() if own))
def test_small_and_large_numbers_of_every_pass_give_eagers_gradients(
    name: str, tmp_path: Path
) -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor]:
        h = nn.functional.dropout((x @ x).relu(), 0.5, training=True)
        return (nn.functional.cross_entropy((h @ h).repeat(1, 40), torch.arange(8)),)

    x = square()
    expected = seeded(function, [x])
    for value in (0, 3, 10**12):
        for option in OWN[name]:
            options: Any = {
                "memory_budget": "min",
                "strict": True,
                "passes": {name: {option: value}},
            }
            if name == "offload_to_files":
                options["passes"][name]["directory"] = str(tmp_path)
            try:
                read_options(options)
            except MemoptError:
                continue
            assert_same(seeded(lowered(function, **options), [x]), expected)


@settings(max_examples=100)
@given(st.text() | st.builds(json.dumps, st.dictionaries(st.text(), st.integers() | st.text())))
def test_any_text_is_options_or_refused(text: str) -> None:
    try:
        options = options_of(text, None)
    except ConfigError as error:
        options = {"allowed is": str(error)}
        helps = "allowed is" in str(error)
    else:
        helps = isinstance(options, dict)
    assert helps, options


@given(st.text())
def test_any_word_of_a_command_is_read_or_refused(text: str) -> None:
    for read in (function_of, lengths_of):
        try:
            read(text)
        except ConfigError:
            continue
    assert_read_or_refused({"memory_budget": number_of(text)})


@pytest.mark.parametrize("text", ["[" * 10**5, "1" * 10**4, "..a:b", ":", "a\0:b", "\udcff:x"])
def test_words_that_break_readers_are_refused(text: str) -> None:
    for read in (lambda: options_of(text, None), lambda: function_of(text)):
        with pytest.raises(ConfigError):
            read()


@pytest.mark.parametrize("value", ["yes", 3, [], {}])
@pytest.mark.parametrize("name", ["dynamic", "fullgraph"])
def test_the_decorator_checks_torchs_own_arguments_too(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        memopt.optimize(lambda x: x, **{name: value})


@given(st.dictionaries(st.sampled_from([*NAMES[:-1], "dynamic", "fullgraph"]), SCALARS))
def test_any_decorator_is_made_or_refused(options: Mapping[str, Any]) -> None:
    with contextlib.suppress(MemoptError):
        assert callable(memopt.optimize(**options)(lambda x: x))
