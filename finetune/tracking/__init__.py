"""Reports on a run while it trains and when it ends: figures, files, a line or a bar, W&B, TensorBoard.

Reading order: metrics (the figures of a step), track (who is told of them), records (the files), progress_bar,
tensorboard_writer, W&B's wandb_link with wandb_writer; summary (the last words of a run).
"""
