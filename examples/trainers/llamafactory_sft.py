import sys

from llamafactory.hparams import read_args
from llamafactory.train.tuner import run_exp

from mergekit_imm import IMMCallback

base, iteration = sys.argv.pop(1), int(sys.argv.pop(1))
args = read_args()
run_exp(args, callbacks=[IMMCallback(base, start=args["model_name_or_path"], iteration=iteration)])
