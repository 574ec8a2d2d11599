"""Reports of a run while it trains and when it ends: figures, files, a line or a bar, W&B, TensorBoard.

Reading order: metrics (the figures of a step), token_groups (by which the load is counted), track (sends them to all
reports), start_record, seen_samples, records (the files), progress_bar, tensorboard_writer, W&B's wandb_link with
wandb_writer; summary (printed at the end of a run).
"""
