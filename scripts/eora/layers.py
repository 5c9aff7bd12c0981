"""Which layers of a model are compressed, and whether a compression's settings fit them."""

from __future__ import annotations

import difflib
import re

from torch import nn

from eora import architectures
from eora.architectures import dense_weight, linear_layers
from eora.errors import Mistake
from eora.streaming import BlockStream


def _kept(keep: list[str], names: dict[str, int], where: str) -> set[str]:
    """The layers that ``keep`` names.

    Raises:
        Mistake: an entry matches no layer, or is no regular expression.
    """
    kept: set[str] = set()
    for part in keep:
        from auto_round.utils import to_standard_regex

        try:
            matched = set(filter(re.compile(to_standard_regex(part)).search, names))
        except ValueError as error:
            raise Mistake(
                f"{where}.keep: {part!r} is part of no name, and no regular "
                f"expression ({error}); mend or remove it"
            ) from None
        if not matched:
            # Without block numbers, as parts of names are given: mlp.down_proj, down_proj.
            words = {re.sub(r".*\.\d+\.", "", name) for name in names}
            words |= {word.rpartition(".")[2] for word in words}
            near = difflib.get_close_matches(part, words, n=3) or sorted(words)
            raise Mistake(
                f"{where}.keep: {part!r} matches no layer of the model; "
                f"mend or remove it. There are {', '.join(near)}"
            )
        kept |= matched
    return kept


def chosen(
    stream: BlockStream, group_size: int, keep: list[str], where: str = "compressions.<name>"
) -> list[str]:
    """Full names of the decoder's linear layers that are compressed; no weights are read.

    Settings that do not fit are refused here: the libraries pass over a name that matches nothing,
    and pack groups that a layer is no multiple of in a way that cannot be loaded back.

    Args:
        stream: the model.
        group_size: weights that share a scale, along a layer's input; -1 is all of them.
        keep: layers left in 16 bits: parts of their names, or regular expressions.
        where: the compression's entry in the config, for messages.

    Raises:
        Mistake: naming the layer, and what would fit.
    """
    widths = {
        name: dense_weight(layer).shape[1] for name, layer in linear_layers(stream.model).items()
    }
    kept = _kept(keep, widths, where)
    taken = [name for name in widths if name.startswith(f"{stream.prefix}.") and name not in kept]
    for name in taken:
        if group_size > 0 and widths[name] % group_size:
            raise Mistake(
                f"{where}.group_size: {group_size} does not divide the width of "
                f"{name} ({widths[name]}); take a smaller one, -1 for whole rows, "
                f"or add {name.rpartition('.')[2]} to keep"
            )
    return taken


def check_plain(stream: BlockStream, *keys: str) -> None:
    """Refuse, for what knows ``nn.Linear`` alone, models whose decoder has other layers.

    Args:
        stream: the model.
        keys: of the config, that ask for such layers.

    Raises:
        Mistake: naming the keys, and the first layer of another kind.
    """
    for index, block in enumerate(stream.blocks):
        others = list(architectures.experts(block)) + [
            name for name, layer in linear_layers(block).items() if type(layer) is not nn.Linear
        ]
        if others:
            kind = type(block.get_submodule(others[0])).__name__
            raise Mistake(
                f"{' and '.join(keys)}: for plain linear layers alone, and "
                f"{stream.name(index)}.{others[0]} is {kind}; take method autoround without around "
                "and adapters without tune, or give this model a config of its own"
            )
