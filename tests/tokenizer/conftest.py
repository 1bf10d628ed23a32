"""Texts that are hard to give back exactly."""

import pytest

NASTY_TEXTS = [
    "",
    " ",
    "  leading, trailing and   runs  ",
    "\t\ttabs\tand\n\n\nlines\r\n\r\x0b\x0c ends\n",
    "▁ ▁▁ literal ▁signs▁",
    "<0x41><0x0A> <0xFF>",
    "<eos><pad> <bos>text<unk> <|endoftext|>",
    "Ġ Ċ ĉ Ā",
    "##ing ## #",
    "\0 and \x01\x02\x7f\x80\x9f",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈 and flags 🇪🇺",
    "中文 العربية हिन्दी ᚠᛇᚻ 𓀀 \U0010ffff",
    "e\u0301 is not \u00e9; \ufeff \u200b\u2028\u2029\u3000\u00a0",
    "\ufffd\ufffe\uffff\ue000",
    "don't 's we'll 12345678901234567890 a.b,c;d !?.",
    "x" * 5_000 + " " * 5_000 + "\n" * 500,
    "".join(map(chr, range(1, 0x250))),
]
TRAINING_TEXT = "".join(f"The {i}th dragon's hatchling isn't <eos> sleeping; it was reading.\n" for i in range(200))


@pytest.fixture(params=NASTY_TEXTS, ids=lambda text: ascii(text[:20]))
def nasty_text(request):
    return request.param
