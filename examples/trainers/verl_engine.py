from verl.checkpoint_engine import CheckpointEngineRegistry, NCCLCheckpointEngine

from mergekit_imm import merged_stream


@CheckpointEngineRegistry.register("nccl_merged")
class MergedEngine(NCCLCheckpointEngine):
    def __init__(self, *args, base, alpha=0.5, **kwargs):
        super().__init__(*args, **{**kwargs, "multi_sender": False})  # relays would count other tensors
        self.base, self.alpha = base, alpha

    async def send_weights(self, weights, global_steps=None):
        if self.rank == 0:  # the other ranks only help to gather
            weights = merged_stream(weights, self.base, alpha=self.alpha, drop=0)
        await super().send_weights(weights, global_steps)
