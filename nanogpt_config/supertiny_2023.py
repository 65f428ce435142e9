"""Overrides of nanoGPT's train.py: the very small transformer as it was trained in 2023.

They are those of the replication's README (HoagyC/sparse_coding), which edited nanoGPT's
config/train_gpt2.py; what that file of June 2023 set besides stands below. supertiny.py trains the
same architecture in 1/375 of the tokens. From nanoGPT's folder, on the data of prepare.py:
    torchrun --standalone --nproc_per_node=8 train.py HERE/nanogpt_config/supertiny_2023.py \\
        --dataset=DATA --out_dir=OUT
"""

import time

dataset = "openwebtext-gpt2"
out_dir = "out-supertiny-2023"

# as published
wandb_project = "sparsecode"
wandb_run_name = "supertiny-" + str(time.time())
n_layer = 6  # as in train_shakespeare_char and in the work of Lee Sharkey
n_embd = 16  # as in the work of Lee Sharkey
n_head = 8
dropout = 0.2  # as in train_shakespeare_char; it slows the learning of so small a model
block_size = 256
batch_size = 64

# from config/train_gpt2.py of June 2023
wandb_log = True  # without a key it blocks: --wandb_log=False
gradient_accumulation_steps = 5 * 8  # 40 * 64 * 256 = 655,360 tokens a step
max_iters = 600000  # 393 billion tokens: 43 epochs of OpenWebText; the authors stopped earlier
lr_decay_iters = 600000
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
