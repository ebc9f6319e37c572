from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from mergekit_imm import IMMCallback


class IMMArgs(BaseModel):
    imm_base: str
    imm_round: int


class IMMPlugin(BasePlugin):
    def get_input_args(self):
        return "axolotl_plugin.IMMArgs"

    def add_callbacks_post_trainer(self, cfg, trainer):
        return [IMMCallback(cfg.imm_base, start=cfg.base_model, iteration=cfg.imm_round)]
