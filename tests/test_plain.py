"""Checkpoints without token types, as other engines see them: by transformers alone."""

import sys

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import interact
import train
from cli import UserError, log
from conversation import Conversation
from dialogs import Dialogs
from inputs import Instances, sentences_inside
from model_files import ModelFiles, decoding_defaults, find_run
from options import Decoding
from template import template_fault
from tiny_models import TEXTS
from utils import load_dataset

SAMPLE = train.Path(train.__file__).parent / "data" / "sample.json"


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """`run(kind, *options)`: the folder of a training of no steps on the sample, and what it told."""

    def run(kind: str, *options):
        folder, told = tmp_path_factory.mktemp("runs"), []
        kept = ["--runs_dir", folder, "--dataset_cache", folder / "cache.bin", "--device", "cpu", "--n_epochs", 0]
        with pytest.MonkeyPatch.context() as patch:
            given = ["--model", tiny(kind), "--dataset_path", SAMPLE, *kept, *options]
            patch.setattr(sys, "argv", ["train.py", *map(str, given)])
            patch.setattr(log, "info", told.append)
            train.main()
        return find_run(str(folder / "latest")), "\n".join(told)

    return run


@pytest.fixture(scope="module")
def plain(run):
    return run("llama", "--max_history", 1)[0]


@pytest.mark.parametrize(
    ("kind", "options", "has_types"),
    [
        ("llama", [], False),
        ("llama", ["--token_types"], True),
        ("gpt2", [], True),
        ("gpt2", ["--no_token_types"], False),
        ("openai-gpt", [], True),
    ],
)
def test_who_has_token_types(kind, options, has_types, run, load):
    folder, told = run(kind, *options)
    model, tokenizer = load(folder)
    assert tokenizer.ids.token_types == model.ids.token_types == has_types
    assert (folder / "multiple_choice_head.safetensors").exists() == (folder / "chat_template.jinja").exists()
    assert (folder / "chat_template.jinja").exists() != has_types and "no chat template" not in told


def test_a_checkpoint_that_does_not_say_has_token_types(plain, load, tmp_path):
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((plain / name).read_bytes())
    config = (plain / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(config.replace('"token_types": false', '"was_there": false'))
    model, _ = load(tmp_path, from_scratch=True)
    assert model.ids.token_types


def test_no_tensor_of_it_is_unexpected_and_the_head_is_beside(plain, load):
    _, report = AutoModelForCausalLM.from_pretrained(plain, output_loading_info=True)
    assert not any(report.values())
    head = load_file(plain / "multiple_choice_head.safetensors")
    model, _ = load(plain)
    assert model.lm.choice_head_trained
    assert {name: tensor.tolist() for name, tensor in head.items()} == {
        f"multiple_choice_head.summary.{name}": tensor.tolist()
        for name, tensor in model.lm.multiple_choice_head.summary.state_dict().items()
    }


@pytest.mark.parametrize("size", range(1, 8))
def test_greedy_replies_by_the_template_are_those_of_a_chat(size, plain, load):
    """Dialogs longer than the history that is shown, too; by transformers' own template, generate and settings."""
    model, tokenizer = load(plain)
    lm, its_tokenizer = AutoModelForCausalLM.from_pretrained(plain).eval(), AutoTokenizer.from_pretrained(plain)
    assert (lm.generation_config.temperature, lm.generation_config.do_sample) == (0.7, True)
    persona = ["i like cats.", "my car is red."]
    chat = Conversation(model, tokenizer, persona, Decoding(no_sample=True, min_length=0), max_history=1, seed=0)
    *history, message = [text[:9] for text in TEXTS][:size]
    chat.resume(history)
    roles = ("user", "assistant") if size % 2 else ("assistant", "user")
    messages = [{"role": "system", "content": " ".join(persona)}]
    messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate([*history, message])]
    row = its_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = row["input_ids"][0].tolist()
    assert ids == chat.generation(tokenizer.encode([message])[0]).prefixes[0][0]
    stop = sorted(tokenizer.ids.all)  # a reply ends at the base model's own, too
    reply = lm.generate(**row, max_new_tokens=20, do_sample=False, eos_token_id=stop)[0, len(ids) :].tolist()
    assert tokenizer.decode(reply) == chat.reply(message)


def test_a_whole_dialog_in_the_template_ends_as_in_training(plain):
    tokenizer = AutoTokenizer.from_pretrained(plain)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<bos><speaker2>hi<speaker1>hello<eos>"


def test_a_tokenizer_that_joins_what_the_rows_keep_apart_gets_no_template(plain, load, tmp_path):
    """One that strips the spaces beside special tokens, and the persona's second sentence of its own."""
    _, tokenizer = load(plain)
    splits = load_dataset(Dialogs(str(SAMPLE), ""), tokenizer, str(tmp_path / "cache.bin"))
    rows = Instances(splits["valid"], tokenizer.ids, 1, 128, inside=sentences_inside(splits["valid"], tokenizer))
    assert template_fault(tokenizer, rows) == ""
    rows.inside = {}  # each sentence as a text of its own, which begins without a space
    assert "other tokens for the reply to" in template_fault(tokenizer, rows)


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        ('{"temperature": 0.5, "max_new_tokens": 30, "eos_token_id": 3}', [], Decoding(temperature=0.5, max_length=30)),
        ('{"temperature": 0.5, "no_repeat_ngram_size": 3}', ["--temperature", "0.7"], Decoding(no_repeat_ngram=3)),
        ("{}", ["--top_k", "5"], Decoding(top_k=5)),
    ],
)
def test_replies_are_drawn_as_the_model_says_where_the_user_does_not(content, options, expected, tmp_path, monkeypatch):
    (tmp_path / "generation_config.json").write_text(content)
    defaults = decoding_defaults(ModelFiles(tmp_path))
    monkeypatch.setattr(sys, "argv", ["interact.py", *options])
    assert interact.parse_settings(defaults)[1] == expected


@pytest.mark.parametrize("content", ['{"temperature": "warm"}', '{"top_p": 7}', "[1]", "{"])
def test_a_generation_config_that_says_nonsense(content, tmp_path):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match="generation_config.json"):
        decoding_defaults(ModelFiles(tmp_path))
