"""Run an experiment: artifacts, packs of cells, evaluations, workers and trackers.

Order of work:

1. `workers` starts the processes of `--workers N`, with `devices` for each; each of them calls `run.run_grid`
2. `artifacts` builds teachers and SFT students with `sft`; `teacher_text`, `teacher_scores`: cached outputs
3. `cell_locks` locks the cells of a pack
4. `train_cells` trains the pack, with `training_inputs`, `build_trainer`, `checkpoint_callback`;
   `pack_capacity`, `memory` and `control_groups` decide how many cells share a model
5. `evaluate_cells` and `lm_eval_runs` evaluate it
6. `trackers` mirror the records to wandb or trackio

`failures`, `repair` and `interrupts` handle errors, damaged files and signals on the way.
"""
