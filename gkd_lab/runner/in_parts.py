"""A step's batch in several parts, for a cell that does not fit into memory otherwise."""

from torch.utils.data import DataLoader

from gkd_lab.training.trainer import GKDTrainer


class MicroBatchTrainer(GKDTrainer):
    """Ends its epochs where they end with whole batches, whatever `gradient_accumulation_steps` is."""

    def get_train_dataloader(self) -> DataLoader:
        """The last rows of an epoch that make no whole batch of a step make none of its parts either."""
        loader = super().get_train_dataloader()
        batches = self._epochs.batch_sampler
        if batches is not None:
            batches.length -= batches.length % self.args.gradient_accumulation_steps
        return loader
