imm-loop base --rounds 3 -o run --train 'deepspeed --module openrlhf.cli.train_sft \
    --model.model_name_or_path {model} --ckpt.output_dir {output} \
    --data.dataset data.jsonl --data.input_key prompt --data.output_key completion'
