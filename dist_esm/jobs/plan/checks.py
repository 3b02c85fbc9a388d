"""What makes a run impossible, found before weights are loaded."""

from __future__ import annotations

from dist_esm.attempt import as_value
from dist_esm.config import Config
from dist_esm.distributed import World
from dist_esm.jobs.plan.room import Room, refuse_too_little
from dist_esm.jobs.plan.work import Output
from dist_esm.jobs.setup import Setup
from dist_esm.model.memory import refuse_what_does_not_fit
from dist_esm.model.weights import architecture
from dist_esm.names import one_line
from dist_esm.planning.units import Plan


def problems_of(
    plan: Plan, output: Output, room: Room, config: Config, setup: Setup, world: World, loads_model: bool
) -> list[str]:
    """Return why the work that this rank has cannot be done, each reason in one line.

    Parameters
    ----------
    plan
        What there is to do; a rank without work needs neither room nor memory.
    output, room
        What all outputs take, and what their file system has.
    config, setup
        Of the run.
    world
        The ranks; those of one host share its memory.
    loads_model
        The model is not on the device yet.
    """
    if not (plan.bins[world.rank] or plan.suspects):
        return []
    outcomes = [as_value(refuse_too_little, output, room, config)]
    if loads_model:
        model = config.model.name, architecture(config.model), setup.device, setup.dtype
        outcomes.append(as_value(refuse_what_does_not_fit, *model, world.local_world_size))
    return [one_line(outcome) for outcome in outcomes if isinstance(outcome, Exception)]
