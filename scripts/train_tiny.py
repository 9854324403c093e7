"""Train, resume and export the bundled model `tiny`, on CPU, from nothing but the running Python's own library.

The whole thing, from a fresh checkout:

    python scripts/train_tiny.py --work runs/tiny --out jaxserve/assets/tiny
    python scripts/eval_tiny.py jaxserve/assets/tiny --json docs/tiny/eval.json
    python scripts/train_tiny.py --work runs/tiny --plot docs/tiny/curve.png

A run that was stopped goes on from its newest checkpoint when the same command is given again. A longer --steps
than before goes on too: the learning rate is then back on its plateau until --decay steps before the new end.
--export-only writes the newest checkpoint without training, also while another process trains.
"""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from pathlib import Path

from tiny import chat, evaluate, plot, tasks, train
from tiny.export import export
from tiny.model import Config
from tiny.tokenizer import split_text, stdlib_files, train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="checkpoints and log go here")
    parser.add_argument("--out", type=Path, help="write the Hugging Face folder here at the end")
    parser.add_argument("--steps", type=int, default=2000, help="optimiser steps in all")
    parser.add_argument("--decay", type=int, default=400, help="steps of falling learning rate at the end")
    parser.add_argument("--stop-at", type=int, help="stop at this step, to resume later")
    parser.add_argument("--lr", type=float, default=4e-3, help="learning rate of the plateau")
    parser.add_argument("--optimizer", choices=("muon", "adam"), default="muon")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export-only", action="store_true", help="do not train")
    parser.add_argument("--plot", type=Path, help="only draw the log into this picture; copies the log beside it")
    args = parser.parse_args()
    if args.plot:
        plot.draw(args.work / "log.jsonl", args.plot)
        shutil.copy(args.work / "log.jsonl", args.plot.with_name("train_log.jsonl"))
        return

    cfg = Config()
    settings = train.Settings(args.steps, args.seed, args.optimizer, args.lr, decay=args.decay)
    files = stdlib_files()
    texts, held_out = split_text(files)
    tok = train_tokenizer(texts, cfg.vocab)
    if args.export_only:
        step, params = train.load_params(args.work, cfg, settings)
        print(f"step {step}")
    else:
        canned = chat.CANNED + chat.module_questions(files)
        look = partial(evaluate.probe, cfg=cfg, lex=tasks.make_lexicon(tok, held_out, canned))
        lex = tasks.make_lexicon(tok, texts, canned)
        params = train.train(cfg, settings, lex, args.work, stop_at=args.stop_at, probe=look)
    if args.out:
        export(params, cfg, tok, args.out)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
