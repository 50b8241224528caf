"""Tiny tokenizers in the shapes that the four families ship, and what they are asked in tests."""

import io
from pathlib import Path

import sentencepiece
from tokenizers import (
    AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors,
    trainers,
)

HERE = Path(__file__).parent
EXTRA = [
    "Où est le café près de la forêt ? À côté, señor; über alles schön, naïve façade.",
    "fn main() { let x = 10; println!(\"{}\", x + 2025); }  // two  spaces",
    "It's what they're saying, isn't it? We'll see; I've heard you'd go. I'm sure.",
]
CORPUS = [
    sentence
    for name in ("story", "expository")
    for sentence in (HERE / f"default_model_{name}.txt").read_text().strip().split(". ")
] + EXTRA

TEXTS = [
    "",
    "Hello",
    "The keeper saw its light.",
    " leading space",
    "   three spaces, then two  inside and one behind ",
    "one\ntwo\n\nthree\r\n\tfour\n",
    "I'm sure they'll say it's 12345 or 3.14, isn't IT'S?",
    "café, cafe\u0301, señor, naïve, Straße, ÅÄÖ",
    "Ελληνικά и русский",
    "日本語のテキスト、中文。한국어",
    "😀 👩‍👩‍👧 🇩🇪 x😀y",
    "fn f(x: &str) -> Vec<u8> { x.as_bytes().to_vec() } // ok!!!???",
    "\u00a0no-break\u200bzero\ufeffbom\u2028line",
    "a\u0000b\u0007c\u007f",
    "▁ already there ▁▁",
    "the the  the   the    the",
    "WWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWW",
]

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def sentencepiece_bpe(vocab):
    """A SentencePiece BPE model with byte fallback, set up as Llama 2's is."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, model_type="bpe", vocab_size=vocab,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        character_coverage=0.995, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def bpe_of(sp):
    """Vocabulary and merges of a SentencePiece BPE: pairs, in the order of the piece they make."""
    vocab = {sp.id_to_piece(i): i for i in range(len(sp))}
    merges = []
    for piece, i in vocab.items():
        if sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i):
            continue
        pairs = [(piece[:c], piece[c:]) for c in range(1, len(piece))]
        pairs = [p for p in pairs if p[0] in vocab and p[1] in vocab]
        pairs.sort(key=lambda p: (vocab[p[0]], vocab[p[1]]))
        merges += [(-sp.get_score(i), pair) for pair in pairs]
    merges.sort(key=lambda m: m[0])
    return vocab, [pair for _, pair in merges]


def special(tok, *names):
    """Registers control tokens."""
    tok.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])


def bos_first(tok, bos, also=()):
    """BOS before every text, as the families' own tokenizer.json does it."""
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tok.token_to_id(bos))],
    )
    tok.post_processor = processors.Sequence([*also, template]) if also else template


def llama2(sp):
    """Llama 2 style: a normalizer prepends the space mark and replaces spaces."""
    vocab, merges = bpe_of(sp)
    tok = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])
    special(tok, "<unk>", "<s>", "</s>")
    bos_first(tok, "<s>")
    return tok


def mistral(sp):
    """Newer Mistral style: the same model under a Metaspace pre-tokenizer."""
    tok = llama2(sp)
    tok.normalizer = None
    tok.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    special(tok, "[INST]", "[/INST]")
    return tok


def byte_level(vocab, split, normalizer=None, ignore_merges=False):
    """A byte-level BPE trained on the corpus."""
    tok = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer:
        tok.normalizer = normalizer
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    ))
    return tok


def llama3(vocab):
    """Llama 3 style: digits by threes, control tokens behind the vocabulary, BOS first."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
             "<|eot_id|>"]
    tok = byte_level(vocab - len(names), LLAMA3_SPLIT, ignore_merges=True)
    special(tok, *names)
    bos_first(tok, names[0], [processors.ByteLevel(trim_offsets=True)])
    return tok


def qwen2(vocab):
    """Qwen2 style: NFC, digits one by one, no BOS."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tok = byte_level(vocab - len(names), QWEN_SPLIT, normalizers.NFC())
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    special(tok, *names)
    return tok


TEMPLATES = {
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = messages[0]['content'] %}"
        "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
        "{% for m in rest %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate user/assistant/user/assistant') }}{% endif %}"
        "{% if loop.first and system != false %}"
        "{% set content = '<<SYS>>\\n' + system.strip() + '\\n<</SYS>>\\n\\n' + m['content'] %}"
        "{% else %}{% set content = m['content'] %}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}"
        "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "llama3": (
        "{%- set ns = namespace(first=true) %}\n"
        "{%- for message in messages %}\n"
        "    {%- set text = '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n'"
        " ~ message.content | trim ~ '<|eot_id|>' %}\n"
        "    {%- if ns.first %}\n"
        "        {%- set text = bos_token ~ text %}\n"
        "        {%- set ns.first = false %}\n"
        "    {%- endif %}\n"
        "    {{- text }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
        "{%- endif %}\n"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}\n"
        "    {% if message['role'] == 'user' %}\n"
        "[INST] {{ message['content'] }} [/INST]{% elif message['role'] == 'assistant' %}\n"
        " {{ message['content'] }}{{ eos_token }}{% elif message['role'] == 'system' %}\n"
        "[INST] {{ message['content'] }} [/INST]{% endif %}\n"
        "{% endfor %}"
    ),
    "qwen2": (
        "{% for message in messages %}"
        "{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}

USER = {"role": "user", "content": "  Why is the sky blue? \n"}
CHATS = [
    [USER],
    [{"role": "system", "content": "Be brief.\nBe kind. "}, USER],
    [
        USER,
        {"role": "assistant", "content": " Because of <|eot_id|></s>\"scattering\" & 'light'. "},
        {"role": "user", "content": "日本語で 😀?"},
    ],
    [USER, USER],
]
