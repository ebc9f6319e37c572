import sys
from pathlib import Path

import ray
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.utils import initialize_ray, validate_cfg
from skyrl.train.utils.callbacks import TrainingCallback

from mergekit_imm import Rounds


class MergeAtEnd(TrainingCallback):
    def __init__(self, cfg, base, iteration):
        self.out = Path(cfg.trainer.export_path)
        self.rounds = Rounds(base, start=cfg.trainer.policy.model.path, iteration=iteration)  # checks them now

    def on_train_end(self, trainer, callback_input, control):
        trainer.dispatch.save_hf_model("policy", str(self.out / "sft"), trainer.tokenizer)
        self.rounds.merge(self.out / "sft", self.out / "merged")


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
