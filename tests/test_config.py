"""Options are validated once, and every mistake is answered with what is allowed."""

import copy
import dataclasses
import json
import math
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.budget import Budget
from memopt.config import MODES, Config, Settings
from memopt.errors import ConfigError

PASSES = {"chunk_losses": ("chunk_bytes",), "sparse_attention": ("window", "sink"), "fuse_glu": ()}
EVERY_OPTION = {
    "memory_budget": "6GiB",
    "passes": {"sparse_attention": {"window": [64, 128]}, "chunk_losses": False, "fuse_glu": True},
    "lowering": "eager",
    "strict": True,
    "cost": "measured",
    "device": "H100",
    "solver": "exact",
    "solver_seconds": 2,
    "repeats": 32,
    "mode": "max-autotune",
    "inductor": {"max_fusion_size": 8, "fusion_options": {"batch": {"min_size": [2]}}},
    "plan": Path("plan.json"),
}


def refused(options: object, **kwargs: object) -> str:
    """The message that these options are refused with."""
    with pytest.raises(ConfigError) as caught:
        Config.from_options(options, known_passes=PASSES, **kwargs)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize("options", [None, {}])
def test_no_options_give_the_defaults(options: dict[str, object] | None) -> None:
    assert Config.from_options(options) == Config()
    assert Config().memory_budget == Budget()
    assert Config().solver_seconds == 5.0


def test_every_option_is_read() -> None:
    config = Config.from_options(EVERY_OPTION, known_passes=PASSES)
    assert set(EVERY_OPTION) == {f.name for f in dataclasses.fields(Config)}
    assert config.memory_budget == Budget("bytes", 6 * 2**30)
    assert config.lowering == "eager"
    assert config.strict is True
    assert config.cost == "measured"
    assert config.device == "H100"
    assert config.solver == "exact"
    assert config.solver_seconds == 2.0
    assert config.repeats == 32
    assert config.mode == "max-autotune"
    assert config.inductor.to_dict() == EVERY_OPTION["inductor"]
    assert config.plan == "plan.json"


def test_a_pass_is_switched_on_or_off_or_configured_by_name() -> None:
    config = Config.from_options(EVERY_OPTION, known_passes=PASSES)
    assert not config.enabled("chunk_losses")
    assert config.enabled("fuse_glu", default=False)
    assert config.enabled("sparse_attention", default=False)
    assert dict(config.pass_options("sparse_attention")) == {"window": (64, 128)}
    assert dict(config.pass_options("chunk_losses")) == {}


@pytest.mark.parametrize("default", [True, False])
def test_a_pass_that_is_not_named_keeps_its_default(default: bool) -> None:
    assert Config().enabled("fuse_glu", default=default) is default
    assert dict(Config().pass_options("fuse_glu")) == {}


def test_options_for_a_pass_switch_it_on_even_when_empty() -> None:
    config = Config.from_options({"passes": {"fuse_glu": {}}}, known_passes=PASSES)
    assert config.enabled("fuse_glu", default=False)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("memory_budjet", "memory_budget"),
        ("budget", "memory_budget"),
        ("activation_memory_budget", "memory_budget"),
        ("Lowering", "lowering"),
        ("pass", "passes"),
        ("solver_time", "solver"),
    ],
)
def test_unknown_option_names_the_nearest_one(name: str, nearest: str) -> None:
    assert f"unknown option {name!r}; did you mean {nearest!r}?" in refused({name: 1})


def test_unknown_option_with_none_near_names_them_all_and_where_inductors_go() -> None:
    message = refused({"triton.cudagraphs": True})
    assert "did you mean" not in message
    for field in dataclasses.fields(Config):
        assert field.name in message
    assert "Inductor's own options go under 'inductor'" in message


@pytest.mark.parametrize("name", [3, None, ("a",), ""])
def test_an_option_name_that_is_no_name_is_refused(name: object) -> None:
    assert f"unknown option {name!r}" in refused({name: 1})


@pytest.mark.parametrize("options", [[], "strict", 3, {"strict"}])
def test_options_that_are_no_mapping_are_refused(options: object) -> None:
    assert "options must be a mapping" in refused(options)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("lowering", "Inductor", "'inductor' or 'eager'; did you mean 'inductor'?"),
        ("lowering", None, "'inductor' or 'eager'"),
        ("lowering", 1, "'inductor' or 'eager'"),
        ("cost", "roof", "did you mean 'roofline'?"),
        ("cost", "", "'roofline' or 'measured'"),
        ("solver", "ilp", "'auto' or 'greedy' or 'exact'"),
        ("solver", ["auto"], "'auto' or 'greedy' or 'exact'"),
        ("strict", 1, "True or False"),
        ("strict", "yes", "True or False"),
        ("strict", None, "True or False"),
        ("device", "", "a string that is not empty"),
        ("device", "  ", "a string that is not empty"),
        ("device", 0, "a string that is not empty"),
        ("plan", "", "a string that is not empty"),
        ("plan", {"kind": "keep"}, "a string that is not empty"),
        ("mode", "max-autotun", "did you mean 'max-autotune'?"),
        ("mode", 3, "None or 'default'"),
        ("solver_seconds", 0, "above 0"),
        ("solver_seconds", -1.0, "above 0"),
        ("solver_seconds", math.nan, "finite"),
        ("solver_seconds", math.inf, "finite"),
        ("solver_seconds", 10**309, "finite"),
        ("solver_seconds", True, "finite"),
        ("solver_seconds", "5", "finite"),
        ("solver_seconds", None, "finite"),
        ("repeats", 0, "an int of at least 1"),
        ("repeats", True, "an int of at least 1"),
        ("repeats", 2.0, "an int of at least 1"),
        ("repeats", "8", "an int of at least 1"),
        ("inductor", None, "a mapping"),
        ("inductor", ["max_autotune"], "a mapping"),
        ("passes", "chunk_losses", "a mapping"),
        ("passes", {"chunk_losses"}, "a mapping"),
    ],
)
def test_a_wrong_value_is_shown_with_what_is_allowed(
    name: str, value: object, allowed: str
) -> None:
    message = refused({name: value})
    assert message.startswith(f"option {name!r} = {value!r}: allowed is ")
    assert allowed in message


@pytest.mark.parametrize("value", [0.0, "6 gigs", True, 1])
def test_an_impossible_budget_is_refused(value: object) -> None:
    assert f"option 'memory_budget' = {value!r}" in refused({"memory_budget": value})


def test_unknown_pass_names_the_nearest_one() -> None:
    message = refused({"passes": {"chunk_loss": False}})
    assert "unknown pass 'chunk_loss'; did you mean 'chunk_losses'?" in message


def test_unknown_option_of_a_pass_names_the_nearest_one() -> None:
    message = refused({"passes": {"sparse_attention": {"windows": 3}}})
    assert "unknown option of pass 'sparse_attention': 'windows'; did you mean" in message
    assert "'window'?" in message


def test_a_pass_without_options_says_so() -> None:
    assert "known: none" in refused({"passes": {"fuse_glu": {"size": 1}}})


@pytest.mark.parametrize("setting", [None, 1, "off", [True]])
def test_a_setting_of_a_pass_is_a_switch_or_a_mapping(setting: object) -> None:
    assert "True (on), False (off), or a mapping" in refused({"passes": {"fuse_glu": setting}})


@pytest.mark.parametrize("value", [print, object(), math.nan, {1, 2}, [{"a": 1j}]])
def test_a_value_that_has_no_place_in_a_cache_key_is_refused(value: object) -> None:
    message = refused({"inductor": {"patch": value}})
    assert "inductor.patch" in message
    assert "compile cache's key" in message


def test_a_name_inside_a_mapping_must_be_a_string() -> None:
    assert "has the key 3: allowed are strings" in refused({"inductor": {3: 1}})


@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_mode_may_come_beside_the_options(mode: str | None) -> None:
    assert Config.from_options({}, mode=mode).mode == mode
    assert Config.from_options({"mode": mode}, mode=mode).mode == mode


def test_two_modes_that_disagree_are_refused() -> None:
    assert "disagree" in refused({"mode": "default"}, mode="max-autotune")


def test_a_wrong_mode_beside_the_options_is_refused() -> None:
    assert "option 'mode' = 'fast'" in refused({}, mode="fast")


def test_pass_names_are_not_checked_without_a_table() -> None:
    config = Config.from_options({"passes": {"anything": {"x": 1}}})
    assert config.pass_options("anything")["x"] == 1


def test_a_config_is_a_value() -> None:
    config = Config.from_options(EVERY_OPTION)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert len({config, Config.from_options(EVERY_OPTION)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.strict = False  # type: ignore[misc]


def test_a_config_does_not_follow_later_changes_of_the_options() -> None:
    options: dict[str, object] = {"inductor": {"sizes": [1, 2]}}
    config = Config.from_options(options)
    options["inductor"]["sizes"].append(3)  # type: ignore[index]
    assert config.inductor["sizes"] == (1, 2)


def test_the_key_does_not_depend_on_the_order_of_the_options() -> None:
    backwards = {name: EVERY_OPTION[name] for name in reversed(EVERY_OPTION)}
    assert Config.from_options(EVERY_OPTION).key() == Config.from_options(backwards).key()


@pytest.mark.parametrize("name", sorted(EVERY_OPTION))
def test_the_key_sees_every_option(name: str) -> None:
    config = Config.from_options({name: EVERY_OPTION[name]})
    assert config.key() != Config().key()
    assert set(json.loads(config.key())) == set(EVERY_OPTION)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
FINITE = SCALARS.filter(lambda value: not isinstance(value, float) or math.isfinite(value))
VALUES = st.recursive(
    FINITE, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_settings_give_back_what_was_put_in(values: dict[str, object]) -> None:
    settings = Config.from_options({"inductor": values}).inductor
    assert settings.to_dict() == values
    assert list(settings) == sorted(values)
    assert hash(settings) == hash(copy.deepcopy(settings))


def test_settings_have_no_other_names() -> None:
    with pytest.raises(KeyError, match="absent"):
        Settings((("present", 1),))["absent"]
