"""``memopt.package``: an exported program, compiled ahead of time under a memory budget."""

from os import PathLike
from typing import Any

from torch.export import ExportedProgram

from memopt import diagnosis
from memopt.backend import cache_key, inductor_patches, read_options
from memopt.errors import ConfigError
from memopt.lowering import package_with_inductor
from memopt.paths import checked_path
from memopt.pipeline import PassContext
from memopt.proofs import Proof
from memopt.splitting import Splitter


def package(
    program: ExportedProgram, path: str | PathLike[str] | None = None, **options: Any
) -> str:
    """Compile a program of ``torch.export`` with AOTInductor, and return the package's path.

    What is widest in the program is cut into pieces until it fits, as for inference with
    ``torch.compile``; the package needs neither memopt nor Python to run. Passes over
    ``torch.compile``'s own graphs, those of losses among them, have no part in it.

    The budget is met by the planner's estimate only: the code is C++, which is not certified.

    Args:
        program: what ``torch.export.export`` returned.
        path: where the package goes, ending in ``.pt2``; None for a place beside Inductor's
            caches.
        **options: as for ``torch.compile(backend="memopt", options=...)``.

    Raises:
        ConfigError: an option is unknown or impossible, or has no meaning here; or there is no
            program, or no such path.
        BudgetInfeasibleError: the program does not fit, in however many pieces.
    """
    config = read_options(options)
    if not isinstance(program, ExportedProgram):
        raise ConfigError(
            f"memopt.package got a {type(program).__name__}: it takes what torch.export.export "
            "returns"
        )
    target = None if path is None else str(checked_path(path, ("pt2",)))
    if config.lowering != "inductor" or config.plan is not None:
        raise ConfigError(
            f"memopt.package takes lowering='inductor' and no plan, not {config.lowering!r} and "
            f"{config.plan!r}: leave both out"
        )
    if config.memory_budget.kind == "fraction":
        raise ConfigError(
            f"memory_budget={config.memory_budget} is a share of a training step's peak, and an "
            f"exported program has no backward: give bytes, or 'min'"
        )
    split = Splitter(config, PassContext(config))
    written = package_with_inductor(
        program,
        split,
        key=cache_key(config, 0, None),
        patches=inductor_patches(config),
        path=target,
    )
    diagnosis.require_fit(split, Proof.of(split, None))
    return written
