"""Fine-tune on right answers with TRL; the loss is that of the answers alone. (TRL 1.16, transformers 5.23.)

A step that is run again resumes from its last checkpoint. With --lora an adapter is left; `imm-loop` applies it.
"""

import argparse
import shutil
from pathlib import Path

import torch
from controls import KeepBest, PullToStart, with_text
from datasets import concatenate_datasets, load_dataset
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, nargs="+", help="what generate.py wrote; several accumulate")
    parser.add_argument("--output", required=True)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=4, help="rows at once on a device")
    parser.add_argument("--accumulation", type=int, default=4, help="batches for a step")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a row; longer ones are left out")
    parser.add_argument("--lora", type=int, metavar="RANK")
    parser.add_argument("--seed", type=int, default=0)
    controls = parser.add_argument_group("what one can do instead of merging")
    controls.add_argument("--pull", action="store_true", help="pull to the start in every step, as strong as alpha .5")
    controls.add_argument("--text", metavar="FILE", help="a quarter of all rows are lines of this text")
    controls.add_argument("--keep-best", nargs="+", metavar="NAME=FILE", help="of four moments, the best at these")
    controls.add_argument("--longest-answer", type=int, default=512, help="tokens of an answer to those")
    arguments = parser.parse_args()
    files = list(dict.fromkeys(str(Path(path).resolve()) for path in arguments.data))
    rows = concatenate_datasets(
        [load_dataset("json", data_files=file, split="train", cache_dir=f"{arguments.output}/cache") for file in files]
    )
    if arguments.text:
        rows = with_text(rows, arguments.text, 1 / 4, seed=arguments.seed)
    peft = None
    if arguments.lora:
        from peft import LoraConfig

        peft = LoraConfig(r=arguments.lora, lora_alpha=2 * arguments.lora, target_modules="all-linear")
    on_gpu = torch.cuda.is_available()
    config = SFTConfig(
        output_dir=f"{arguments.output}/checkpoints",
        learning_rate=arguments.lr,
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch,
        gradient_accumulation_steps=arguments.accumulation,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # below 1 it is a share of all steps
        max_length=None,
        completion_only_loss=True,
        bf16=not on_gpu or torch.cuda.is_bf16_supported(),  # products alone; weights are float32
        use_cpu=not on_gpu,
        gradient_checkpointing=on_gpu,
        save_strategy="epoch" if on_gpu else "no",  # on a CPU only small models are trained
        save_total_limit=1,
        logging_steps=10,
        report_to="none",
        seed=arguments.seed,
        model_init_kwargs={"dtype": "float32"},  # what is trained; the merge rounds to the base's dtype
    )
    trainer = SFTTrainer(arguments.model, args=config, train_dataset=rows, peft_config=peft)
    if arguments.pull:
        trainer.add_callback(PullToStart())
    if arguments.keep_best:
        trainer.add_callback(KeepBest(trainer.processing_class, arguments.keep_best, arguments.longest_answer))
    long = [number for number, row in enumerate(trainer.train_dataset) if len(row["input_ids"]) > arguments.longest]
    if long:
        print(f"{len(long)} of {len(rows)} rows are longer than {arguments.longest} tokens, and left out")
        skipped = set(long)
        trainer.train_dataset = trainer.train_dataset.select(n for n in range(len(rows)) if n not in skipped)
    last = get_last_checkpoint(config.output_dir) if Path(config.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(arguments.output)  # with the tokenizer
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        for name in ("checkpoints", "cache"):
            shutil.rmtree(Path(arguments.output) / name, ignore_errors=True)


if __name__ == "__main__":
    main()
