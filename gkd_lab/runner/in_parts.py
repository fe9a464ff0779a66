"""A step's batch in several parts, for a cell that does not fit into memory otherwise."""

from gkd_lab.encoding.batches import KeyedBatchSampler
from gkd_lab.training.trainer import GKDTrainer


class MicroBatchTrainer(GKDTrainer):
    """Ends its epochs where they end with whole batches, whatever `gradient_accumulation_steps` is."""

    def build_batch_sampler(self) -> KeyedBatchSampler:
        """Build a sampler without the last rows of an epoch that make no whole batch of a step."""
        sampler = super().build_batch_sampler()
        sampler.length -= sampler.length % self.args.gradient_accumulation_steps
        return sampler
