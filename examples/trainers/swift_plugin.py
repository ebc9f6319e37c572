import os

from swift.callbacks import callbacks_map

from mergekit_imm import IMMCallback


class MergeAtEnd(IMMCallback):
    def __init__(self, args, trainer):
        super().__init__(os.environ["IMM_BASE"], start=os.environ["IMM_START"], iteration=int(os.environ["IMM_ROUND"]))
        self.trainer = trainer

    def on_train_end(self, *args, **kwargs):
        super().on_train_end(*args, **kwargs)
        self.trainer.save_model(os.environ["IMM_OUT"])  # ms-swift saves its last checkpoint before this


callbacks_map["imm"] = MergeAtEnd
