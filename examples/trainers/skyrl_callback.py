import os
import sys

import ray
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.utils import initialize_ray, validate_cfg
from skyrl.train.utils.callbacks import TrainingCallback

from mergekit_imm import Rounds


class MergeAtEnd(TrainingCallback):
    def __init__(self, cfg, base, iteration):
        self.out = cfg.trainer.export_path
        self.rounds = Rounds(base, start=cfg.trainer.policy.model.path, iteration=iteration)  # checks them now

    def on_train_end(self, trainer, callback_input, control):
        sft = os.path.join(self.out, "sft")
        trainer.dispatch.save_hf_model("policy", sft, trainer.tokenizer)
        self.rounds.merge(sft, os.path.join(self.out, "merged"))


@ray.remote(num_cpus=1)
def run(cfg, base, iteration):
    class Experiment(BasePPOExp):
        def get_trainer(self, *args, **kwargs):
            trainer = super().get_trainer(*args, **kwargs)
            trainer.add_callback(MergeAtEnd(cfg, base, iteration))
            return trainer

    Experiment(cfg).run()


if __name__ == "__main__":
    cfg = SkyRLTrainConfig.from_cli_overrides(sys.argv[3:])
    validate_cfg(cfg)
    initialize_ray(cfg)
    ray.get(run.remote(cfg, sys.argv[1], int(sys.argv[2])))
