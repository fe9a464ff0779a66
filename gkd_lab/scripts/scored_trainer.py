"""GKDTrainer whose evaluations also let the student write, and score its text with the project's metrics.

The scores are part of the Trainer's own evaluation, as `eval_rouge2`, so that `metric_for_best_model`,
`load_best_model_at_end`, early stopping and trackers read them like the loss.
"""

from collections.abc import Callable, Sequence
from typing import Any

from accelerate.utils import gather_object

from gkd_lab.config.cell import Evaluation
from gkd_lab.evaluation.decoding import generate_predictions
from gkd_lab.metrics.scored_predictions import Prediction
from gkd_lab.metrics.text_metrics import Scorer
from gkd_lab.scripts.user_data import Rows, build_scored_rows
from gkd_lab.tasks import Row
from gkd_lab.training.trainer import GKDTrainer


class ScoredTrainer(GKDTrainer):
    """GKDTrainer that scores what the student writes, and whose model card is written by `write_card`.

    Args:
        evaluation: How the student writes, and the metrics; None: the loss is evaluated alone.
        options: The arguments of GKDTrainer.

    Attributes:
        write_card: Writes README.md into the output folder; set in the main process alone.
        predictions: What the student wrote in the last evaluation, by row; the same in each process.
    """

    def __init__(self, *, evaluation: Evaluation | None, **options: Any) -> None:
        super().__init__(**options)
        self.evaluation = evaluation
        self.write_card: Callable[[], None] | None = None
        self.predictions: list[Prediction] = []
        self._scorer = Scorer()
        self._scored_rows: dict[int, tuple[Rows, list[Row], list[Any]]] = {}
        # By id of the rows, which are kept so that no others get that id.

    def prepare_scored_rows(self, rows: Rows, split: str) -> None:
        """Encode the rows of an evaluation set, once. ConfigError for a row without a completion."""

        def decode(ids: Sequence[int]) -> str:
            """Return token ids as text, without special tokens."""
            return self.processing_class.decode(ids, skip_special_tokens=True)

        if self.evaluation is not None and id(rows) not in self._scored_rows:
            self._scored_rows[id(rows)] = (rows, *build_scored_rows(rows, split, decode, self.encode_row))

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
        """Run and return GKDTrainer's evaluation, with `PREFIX_METRIC` of each metric among its metrics.

        Also `PREFIX_mean_length`, in tokens, and `PREFIX_truncated`, the share cut at `max_new_tokens`.
        """
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        if self.evaluation is not None:
            dataloader = args[0] if args else options["dataloader"]
            self.predictions = self._write_predictions(dataloader.dataset)
            scores = self._score_predictions(self.evaluation.metrics)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output

    def _write_predictions(self, rows: Rows) -> list[Prediction]:
        """Let the student complete the prompts of an evaluation set; return all predictions, by row.

        Each process takes every n-th row. All take all rows of a student whose weights are sharded, which
        must run in step.
        """
        self.prepare_scored_rows(rows, "eval")
        _, texts, examples = self._scored_rows[id(rows)]
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        number, world = (0, 1) if is_sharded else (self.args.process_index, self.args.world_size)
        assert self.evaluation is not None
        with self.use_run_precision():
            (predictions,) = generate_predictions(
                self.pack,
                self.processing_class,
                texts,
                examples,
                self.evaluation,
                shard=(number, world),
                max_sequences=self.args.per_device_eval_batch_size,
            )
        if world == 1:
            return predictions
        indices = range(number, len(texts), world)
        gathered = gather_object(list(zip(indices, predictions, strict=True)))
        return [prediction for _, prediction in sorted(gathered, key=lambda pair: pair[0])]

    def _score_predictions(self, metrics: Sequence[str]) -> dict[str, float]:
        """Return metric -> score of the last predictions, and their mean length and truncated share."""
        texts = [prediction.text for prediction in self.predictions]
        references = [prediction.references for prediction in self.predictions]
        scores = self._scorer.score_many(metrics, texts, references)
        count = len(texts)
        return {name: score.value for name, score in scores.items()} | {
            "mean_length": sum(prediction.tokens for prediction in self.predictions) / count,
            "truncated": sum(not prediction.ended for prediction in self.predictions) / count,
        }

    def create_model_card(self, *args: Any, **fields: Any) -> None:
        """Write the run's own card; the arguments of the Trainer's draft are not used."""
        if self.write_card is not None:
            self.write_card()
