"""The rows that a cell or an artifact needs, as texts and as token ids."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from gkd_lab.distill.batches import Cut, Example, encode
from gkd_lab.records.files import write_json
from gkd_lab.spec.cell import DataSpec, SftModel, Split
from gkd_lab.tasks import Row, get_task, load_rows


@lru_cache(maxsize=16)
def rows(task: str, data: DataSpec, split: Split, cache: Path) -> tuple[Row, ...]:
    """The rows of a split, as many as the spec asks for or as there are. ValueError for broken data."""
    return tuple(
        load_rows(
            get_task(task),
            data.kind,
            name=data.name,
            path=data.path,
            revision=data.revision,
            config=data.config,
            split=split,
            count=getattr(data, split),
            seed=data.seed,
            cache=cache,
        )
    )


def texts(model: SftModel, found: tuple[Row, ...]) -> list[tuple[str, str]]:
    """(prompt, target) as the model reads them: a decoder's prompt ends with a line break."""
    end = "\n" if model.family == "decoder-only" else ""
    return [(row.prompt + end, row.target) for row in found]


def examples(model: SftModel, tokenizer: Any, found: tuple[Row, ...]) -> tuple[list[Example], Cut]:
    """Token ids of the rows within the model's limits, and how many rows were cut."""
    return encode(
        tokenizer,
        texts(model, found),
        is_encoder_decoder=model.family == "encoder-decoder",
        max_input_tokens=model.max_input_tokens,
        max_output_tokens=model.max_output_tokens,
    )


def report_cut(folder: Path, split: str, cut: Cut) -> None:
    """Say beside the record how many rows were longer than the limits."""
    write_json(folder / f"rows-{split}.json", vars(cut))
