from pathlib import Path

from verl.trainer.ppo.checkpoint_callback import CheckpointCallback

from mergekit_imm import Rounds


class MergeAtEnd(CheckpointCallback):
    def __init__(self, config=None):
        super().__init__(config)
        model, imm = config.actor_rollout_ref, config.imm
        if "hf_model" not in model.actor.checkpoint.save_contents or model.actor.checkpoint.async_save:
            raise ValueError("the merge needs hf_model in save_contents, and async_save=False")
        self.rounds = Rounds(imm.base, start=model.model.path, iteration=imm.round)  # checks base and options now

    def on_save(self, trainer, global_step, checkpoint_dir, async_save=False, **kwargs):
        if global_step >= trainer.total_training_steps:
            folder = Path(checkpoint_dir)
            self.rounds.merge(folder / "actor" / "huggingface", folder.parent / "merged")
