imm-loop base --rounds 3 -o run --train 'accelerate launch open_instruct/finetune.py \
    --model_name_or_path {model} --output_dir {output} --do_not_randomize_output_dir \
    --dataset_mixer_list data.jsonl 1.0'
