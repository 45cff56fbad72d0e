"""A plan of spans, as data: how far every head of a model looks back, and what that costs.

It is JSON that can be read, compared and kept. A hash of the text goes with it, so that a file
that was cut off, or edited by hand, is no plan.
"""

import dataclasses
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from memopt.attention.layers import LayerSpans, LengthLoss, computed, density, model_fingerprint
from memopt.attention.rules import from_dict, to_dict
from memopt.attention.view import draw, layer_table, length_table
from memopt.errors import ConfigError, PlanError
from memopt.stored import count, number, parse, read_plan_text, signature, some_list, text_of

SCHEMA = 1
KIND = "memopt span plan"
MOST_RULES = 2  # in one layer
_WHERE = "memopt.attention.calibrate(...).save(path) writes one"
_PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanPlan:
    """How far each head of keys looks back, for one model.

    Attributes:
        layers: the calls of attention that the model makes, in order.
        sinks: first tokens of a sequence that every query sees besides its span.
        block: tokens on a side of the blocks in which influence was summed.
        budget: the bound on the density at each of the calibrated lengths.
        guard: the bound on the relative rise of the held-out loss.
        lengths: of the sequences that were profiled, in tokens, ascending.
        data_hash: of these sequences.
        losses: of held-out sequences, by length, ascending.
        objective: which of the candidates it is.
    """

    layers: tuple[LayerSpans, ...]
    sinks: int
    block: int
    budget: float
    guard: float
    lengths: tuple[int, ...]
    data_hash: str
    losses: tuple[LengthLoss, ...]
    objective: str

    @property
    def fingerprint(self) -> str:
        """Of the model that it is for."""
        return model_fingerprint(self.layers)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest sequence that was profiled or held out."""
        return min((*self.lengths, *(row.length for row in self.losses)))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that was profiled or held out."""
        return max((*self.lengths, *(row.length for row in self.losses)))

    @property
    def loss_change(self) -> float:
        """How much the held-out loss rises, over itself, at the length where it rises most."""
        return max(row.change for row in self.losses)

    def density(self, n: int) -> float:
        """The share of ``n`` keys that the last query sees, over all heads of keys."""
        return density(self.layers, self.sinks, n)

    def computed(self, n: int) -> float:
        """The share of the entries of a causal map of ``n`` tokens that are computed."""
        return computed(self.layers, self.sinks, n)

    def to_json(self) -> str:
        """Serialise: the same plan gives the same text."""
        body = {
            "kind": KIND,
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            **{name: getattr(self, name) for name in _PLAIN},
            "losses": [dataclasses.asdict(row) for row in self.losses],
            "layers": [_layer_dict(layer) for layer in self.layers],
        }
        return json.dumps({**body, "hash": signature(body)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "SpanPlan":
        """Read a plan back.

        Raises:
            PlanError: the text is no plan of spans, of another schema, cut off or edited.
        """
        body = parse(text, "plan of spans", _WHERE)
        if not isinstance(body, Mapping) or body.get("kind") != KIND:
            seen = body.get("kind") if isinstance(body, Mapping) else type(body).__name__
            raise PlanError(
                f"not a plan of spans: its kind is {seen!r:.100}, not {KIND!r}; {_WHERE}"
            )
        if body.get("schema") != SCHEMA:
            raise PlanError(
                f"the plan's schema is {body.get('schema')!r:.100}, this version reads {SCHEMA}: "
                "calibrate again"
            )
        rest = {name: value for name, value in body.items() if name != "hash"}
        if body.get("hash") != signature(rest):
            raise PlanError(
                "the plan was changed after it was written: its hash is another; take the file "
                "as it was written, or calibrate again"
            )
        try:
            plan = _read(rest)
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise PlanError(f"the plan's field is missing or malformed: {error}") from error
        if plan.fingerprint != body.get("fingerprint"):
            raise PlanError("the plan's fingerprint is not that of its layers: calibrate again")
        return plan

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan to a file; one that exists is replaced."""
        target = Path(path)
        target.write_text(self.to_json() + "\n", encoding="utf-8")
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SpanPlan":
        """Read a plan from a file.

        Raises:
            PlanError: there is no such file, or it is no plan of spans.
        """
        return cls.from_json(read_plan_text(path))

    def plot(self, path: str | os.PathLike[str] = "spans.png") -> Path:
        """Draw the spans and errors of all heads, and the loss at every length.

        Args:
            path: a file that ends in ``.png``, ``.svg`` or ``.pdf``; one that exists is replaced.

        Raises:
            ConfigError: the suffix is another one, or no layer has rules.
            MissingExtraError: matplotlib is not installed.
        """
        target = Path(path)
        if target.suffix.lower() not in _PICTURES:
            raise ConfigError(
                f"cannot draw {str(target)!r}: the name must end in {' or '.join(_PICTURES)}"
            )
        if not any(layer.rules for layer in self.layers):
            raise ConfigError("no layer of the plan has rules: there is nothing to draw")
        draw(self.layers, self.losses, target)
        return target

    @property
    def headline(self) -> str:
        """The plan in one line."""
        lengths = f"{self.shortest} to {self.longest} tokens"
        read = f"{self.density(self.longest):.1%} of the keys read at {self.longest}"
        return f"spans for {lengths}: {read}, held-out loss {self.loss_change:+.2%} at most"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"memopt: {self.headline}", style="bold")
        facts = f"model {self.fingerprint}, data {self.data_hash}, {self.sinks} sinks"
        yield Text(f"{facts}, budget {self.budget:g}, guard {self.guard:g}", style="dim")
        yield layer_table(self.layers, self.longest)
        yield length_table(self.layers, self.sinks, self.losses)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


_PLAIN = ("sinks", "block", "budget", "guard", "lengths", "data_hash", "objective")


def _layer_dict(layer: LayerSpans) -> dict[str, object]:
    body: dict[str, object] = {
        field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)
    }
    return {**body, "rules": [to_dict(rule) for rule in layer.rules]}


def _read(body: Mapping[str, Any]) -> SpanPlan:
    return SpanPlan(
        layers=tuple(_read_layer(layer) for layer in some_list(body["layers"])),
        sinks=count(body["sinks"], least=0),
        block=count(body["block"]),
        budget=number(body["budget"]),
        guard=number(body["guard"]),
        lengths=tuple(count(n) for n in some_list(body["lengths"], 1)),
        data_hash=text_of(body["data_hash"]),
        losses=tuple(_read_loss(row) for row in some_list(body["losses"], 1)),
        objective=text_of(body["objective"]),
    )


def _read_layer(body: Mapping[str, Any]) -> LayerSpans:
    layer = LayerSpans(
        name=text_of(body["name"]),
        query_heads=count(body["query_heads"]),
        heads=count(body["heads"]),
        width=count(body["width"]),
        scale=number(body["scale"]),
        rules=tuple(from_dict(rule) for rule in some_list(body["rules"])),
        errors=tuple(number(error) for error in some_list(body["errors"])),
    )
    if layer.query_heads % layer.heads:
        raise ValueError(f"{layer.query_heads} heads of queries read {layer.heads} of keys")
    if len(layer.rules) not in (0, layer.heads) or len(layer.errors) != len(layer.rules):
        raise ValueError(
            f"{layer.name!r} has {layer.heads} heads of keys, {len(layer.rules)} rules and "
            f"{len(layer.errors)} errors"
        )
    if len(set(layer.rules)) > MOST_RULES:
        raise ValueError(f"{layer.name!r} has more than {MOST_RULES} rules")
    return layer


def _read_loss(body: Mapping[str, Any]) -> LengthLoss:
    return LengthLoss(
        length=count(body["length"]),
        full=number(body["full"]),
        sparse=number(body["sparse"]),
        batches=count(body["batches"]),
    )
