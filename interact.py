"""Talk to a fine-tuned model in the terminal."""

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from utils import (
    FINETUNED_NOTE,
    Parser,
    UserError,
    add_decoding_options,
    add_model_options,
    check_device,
    find_finetuned_model,
    load_personas,
    load_tokenizer,
    log,
    run_script,
    set_seed,
)


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_options(parser, note=FINETUNED_NOTE)
    add_decoding_options(parser)
    persona = parser.add_mutually_exclusive_group()
    persona.add_argument("--personality", action="append", help="a sentence of the persona; can be repeated")
    persona.add_argument("--personality_file", help="a text file with a sentence of the persona in each line")
    parser.add_argument("--seed", type=int, default=42, help="of persona and replies (0: other ones on each run)")
    return parser.parse_args()


def choose_persona(args: argparse.Namespace) -> list[str]:
    """The persona given by the options, or one drawn from the dataset."""
    if args.personality:
        return args.personality
    if args.personality_file:
        try:
            lines = Path(args.personality_file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read --personality_file {args.personality_file}: {error}; expected UTF-8 text"
            ) from error
        return [line.strip() for line in lines if line.strip()]
    try:
        return random.choice(load_personas(args.dataset_path))
    except UserError as error:
        raise UserError(f"{error}; or give a persona with --personality 'i like cats.'") from error


def typed_lines() -> Iterator[str]:
    """What the user says, line by line until Ctrl-D; a prompt and a history of lines at a terminal only."""
    terminal = sys.stdin.isatty()
    if terminal:
        try:
            import readline  # noqa: F401 - importing it gives input() arrow keys and history
        except ImportError:  # Windows has none; input() has line editing of its own there
            pass
    while True:
        try:
            line = input(">>> " if terminal else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"the input is not {error.encoding} text; send text in that encoding") from error
        if line.strip():
            yield line.strip()
        elif terminal:
            print("Please type something (Ctrl-D ends the chat).")
        else:
            print()  # a line per turn: an empty one has an empty reply


def main() -> None:
    args = parse_args()
    device = check_device(args.device)
    seed = args.seed or random.SystemRandom().randrange(1, 2**31)
    set_seed(seed)
    persona = choose_persona(args)

    from model import Conversation, Decoding, load_model  # heavy: after all that can be told to be wrong at once

    files = find_finetuned_model(args.model)
    tokenizer = load_tokenizer(files, args.pre_tokenizer)
    model = load_model(files, tokenizer, device)
    if not tokenizer.fine_tuned:
        log.warning("warning: this model was not fine-tuned on dialogs, so expect nonsense; train it with train.py")
    log.info("Persona: " + " ".join(persona))
    chat = Conversation(model, tokenizer, persona, Decoding.from_args(args), args.max_history, seed)
    try:
        for line in typed_lines():
            print(chat.reply(line), flush=True)
    except KeyboardInterrupt:
        pass  # Ctrl-C ends the chat like Ctrl-D
    if sys.stdin.isatty():
        print()


if __name__ == "__main__":
    run_script(main)
