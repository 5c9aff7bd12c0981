"""Name the configuration to take for a budget of bytes, or for a wanted recovery, of those that
were measured; and the rank that was not, if running it is likely to be worth it.

The score is 0 for the model's worst compression without adapter and 1 for the original; the mean
over tasks. Without --budget and --recover, the best of every size is listed."""

import math
from pathlib import Path
from typing import Annotated

import typer

from eora import cli, commands, stages
from eora.errors import Mistake


def main(
    config: Annotated[Path, typer.Option(help="The config whose results are looked at.")] = Path(
        "config.yaml"
    ),
    budget: Annotated[
        float | None, typer.Option(help="Most megabytes (1,000,000 bytes) of all tensors.")
    ] = None,
    recover: Annotated[
        float | None, typer.Option(help="Share of the loss to win back, such as 0.9.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Score by this task (several: once each).")
    ] = None,
) -> None:
    cli.setup()
    wanted = commands.load_config(config)
    if budget is not None and recover is not None:
        raise Mistake("--budget and --recover: give one of them")
    unknown = set(task or ()) - set(wanted["tasks"])
    if unknown:
        raise Mistake(
            f"--task: {config} has no {', '.join(sorted(unknown))}; "
            f"it has {', '.join(wanted['tasks'])}"
        )
    from eora import recommendation as rec
    from eora import report

    results = Path(wanted["results"])
    frame = report.build(results, stages.report_params(wanted))
    for model, rows in frame.groupby("model", sort=False):
        scored = rec.scores(rows, task or wanted["tasks"])
        if not scored:
            raise Mistake(f"{model}: no compression lost anything on these tasks; name others")
        tested = rec.measured(rows, scored)
        others = rec.untested(rows, scored, rec.kept_curves(rows))
        typer.echo(f"{model}:")
        if budget is not None:
            take = rec.best_within(tested, budget * 1e6)
            better = rec.best_within([o for o in others if worth(o, take)], budget * 1e6)
            say(take, better, f"nothing measured fits {budget:g} MB")
        elif recover is not None:
            take = rec.cheapest(tested, recover)
            smaller = [o for o in others if take is None or o.bytes < take.bytes]
            say(take, rec.cheapest(smaller, recover), f"nothing measured reaches {recover:g}")
        else:
            best = -math.inf
            for option in sorted(tested, key=lambda o: (o.bytes, -o.score)):
                if option.score > best:
                    best = option.score
                    typer.echo(f"  {line(option)}")


def worth(option, take) -> bool:
    """Whether a prediction is better than what was measured by more than it may be off."""
    return take is None or option.score - (option.miss or 0) > take.score


def line(option) -> str:
    text = f"{option.name}: {option.bytes / 1e6:,.1f} MB, score {option.score:.3f}"
    if option.miss is None:
        return text
    known = not math.isnan(option.miss)
    return text + (f" ± {option.miss:.3f} (predicted)" if known else " (predicted, error unknown)")


def say(take, untested, nothing: str) -> None:
    typer.echo(f"  {nothing if take is None else f'take {line(take)}'}")
    if untested is None:
        typer.echo("  no untested rank is likely to do better")
    else:
        typer.echo(f"  worth running: {line(untested)}")


if __name__ == "__main__":
    cli.run(main, __doc__)
