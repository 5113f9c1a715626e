"""Byte-level BPE tokenizers trained on a small fixed text, each with its family's own pre-tokenizer and special tokens.

The regular expressions are those of the families' published tokenizer.json files.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Style:
    """How one family tokenizes. `pattern` is None for GPT-2's own splitting inside ByteLevel.

    `inverted`: the split is written as "remove what does not match", as converted tiktoken files do.
    """

    pattern: str | None
    special: tuple[str, ...]
    bos: str | None
    eos: str
    adds_bos: bool
    special_first: bool = False
    ignore_merges: bool = False
    nfc: bool = False
    inverted: bool = False
    chat_template: str | None = None
    tokenizer_class: str = "PreTrainedTokenizerFast"


STYLES = {
    "llama-3": Style(
        CL100K,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        adds_bos=True,
        ignore_merges=True,
        chat_template="{{ bos_token }}{% for message in messages %}{{ message['content'] }}<|eot_id|>{% endfor %}",
    ),
    "tekken": Style(
        TEKKEN,
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        "<s>",
        "</s>",
        adds_bos=True,
        special_first=True,
        ignore_merges=True,
    ),
    "qwen2": Style(
        QWEN2,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        None,
        "<|im_end|>",
        adds_bos=False,
        nfc=True,
        chat_template=CHATML,
        tokenizer_class="Qwen2Tokenizer",
    ),
    "phi-4": Style(
        CL100K,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"),
        "<|endoftext|>",
        "<|im_end|>",
        adds_bos=False,
        inverted=True,
        chat_template=CHATML,
    ),
    "gpt2": Style(None, ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>", adds_bos=False),
}


def train(style: Style, vocabulary: int = 700) -> Tokenizer:
    """A tokenizer of at most `vocabulary` entries, trained on TEXT. Deterministic."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=style.ignore_merges))
    if style.nfc:
        tokenizer.normalizer = normalizers.NFC()
    if style.pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        behavior = "removed" if style.inverted else "isolated"
        split = pre_tokenizers.Split(Regex(style.pattern), behavior=behavior, invert=style.inverted)
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - (0 if style.special_first else len(style.special)),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(style.special) if style.special_first else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens(list(style.special))
    byte_level = processors.ByteLevel(trim_offsets=False)
    if style.adds_bos and style.bos is not None:
        template = processors.TemplateProcessing(
            single=f"{style.bos} $A",
            pair=f"{style.bos} $A {style.bos}:1 $B:1",
            special_tokens=[(style.bos, tokenizer.token_to_id(style.bos))],
        )
        tokenizer.post_processor = processors.Sequence([byte_level, template])
    else:
        tokenizer.post_processor = byte_level
    return tokenizer


def write_tokenizer(folder: Path, name: str) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json in the style `name`; returns the tokenizer."""
    style = STYLES[name]
    tokenizer = train(style)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": style.tokenizer_class,
        "bos_token": style.bos,
        "eos_token": style.eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    if style.tokenizer_class == "Qwen2Tokenizer":
        settings |= {"unk_token": None, "pad_token": "<|endoftext|>", "add_bos_token": False}
    if style.chat_template is not None:
        settings["chat_template"] = style.chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False))
    return tokenizer


TEXT = """\
The river rises in the hills above the town and runs for ninety miles before it reaches the sea. In spring, when the
snow melts, the water comes down brown and fast, and the people who live along the banks move their boats to higher
ground. It's an old habit; nobody remembers when it started, and they'll tell you that it has never failed them.
"We've seen worse," said the ferryman. "I'd worry if the herons left, but they haven't, so I'm not going to." He
couldn't have known what the engineers upstream were planning, and he wouldn't have believed it if you'd told him.
The committee met on 14 March 1987, 3 April 1992 and again on 2024-11-05; the budget was 1,234,567.89 euros, of which
12.5 % had been spent. Call 555-0199 or write to info@example.org; see https://example.org/path?query=1&page=22.
Der Fluss entspringt in den Hügeln über der Stadt und fließt neunzig Meilen, bevor er das Meer erreicht. Die Größe der
Häuser hängt von den Straßen ab, und für die Mädchen gab es schöne Bücher. Über allen Gipfeln ist Ruh.
La rivière prend sa source dans les collines, au-dessus de la ville, et s'écoule jusqu'à la mer. C'était l'été où les
élèves avaient étudié à l'école près de la forêt; où êtes-vous allés, et pourquoi n'avez-vous rien dit?
El río nace en las colinas sobre la ciudad y corre noventa millas antes de llegar al mar. ¿Dónde está el niño? ¡Mañana
será otro día! Los años pasan, la montaña permanece, y el corazón recuerda todavía la canción del señor Ibáñez.
Река берёт начало на холмах над городом и течёт девяносто миль, прежде чем достигнет моря. Никто не помнит, когда это
началось. Мы видели и хуже, сказал паромщик, и люди ему поверили.
Ο ποταμός πηγάζει από τους λόφους πάνω από την πόλη και φτάνει στη θάλασσα. Κανείς δεν θυμάται πότε ξεκίνησε.
河流发源于城镇上方的山丘，流经九十英里才到达大海。春天雪融化的时候，河水又黄又急。没有人记得这是什么时候开始的。
川は町の上の丘に源を発し、海に達するまで九十マイルを流れます。いつ始まったのか誰も覚えていません。カタカナもあります。
강은 마을 위 언덕에서 시작하여 바다에 이르기까지 구십 마일을 흐릅니다. 언제 시작되었는지 아무도 기억하지 못합니다.
ينبع النهر من التلال فوق المدينة ويجري تسعين ميلا قبل أن يصل إلى البحر. لا أحد يتذكر متى بدأ ذلك.
הנהר נובע מהגבעות שמעל העיר וזורם תשעים מייל לפני שהוא מגיע לים. אף אחד לא זוכר מתי זה התחיל.
Sông bắt nguồn từ những ngọn đồi phía trên thị trấn và chảy chín mươi dặm trước khi ra đến biển.

def encode(values, block=32):
    \"\"\"Return the codes of each block.\"\"\"
    result = []
    for index in range(0, len(values), block):
        chunk = values[index : index + block]
        scale = max(abs(value) for value in chunk) / 127.0
        if scale == 0:
            result.append((0.0, [0] * len(chunk)))
            continue
        result.append((scale, [round(value / scale) for value in chunk]))
    return result


class Reader(object):
    def __init__(self, path: str, *, limit: int = 1 << 20) -> None:
        self.path = path
        self.limit = limit

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            return file.read(self.limit)

#include <stdio.h>
int main(int argc, char **argv) {
\tfor (int i = 0; i < argc; ++i) {
\t\tprintf("%d: %s\\n", i, argv[i]);
\t}
\treturn 0;
}

SELECT name, count(*) AS total FROM people WHERE age >= 18 AND city <> 'Paris' GROUP BY name ORDER BY total DESC;
{"name": "value", "numbers": [1, 2, 3, 10, 100, 1000], "nested": {"true": true, "null": null}}
<html><body class="main"><p>Hello, world!</p><a href="/index.html">index</a></body></html>
Some people 😀 like 🎉 emoji 👍 and others 🙃 don't. Prices: $5, €10, £20, ¥1000. x² + y² = z², a ≤ b, c → d, ∑∞√.
"""

# Compared between tokenizers: prose, contractions, scripts, digits, whitespace runs, code, emoji.
PROBE_TEXTS = (
    "The river rises in the hills above the town.",
    "It's what they'll say; we've seen it, I'd swear, you're right, isn't it? IT'S, THEY'LL, I'M, 'tis 's 'S",
    "Hello world  two  spaces   three\ttab\t\ttabs \n newline\n\nblank\r\nwindows\r\n\r\n   \n  indented    ",
    " leading space and trailing space ",
    "1 12 123 1234 12345 123456 1234567 3.14159 1,234,567.89 2024-11-05 0x7fff 1e-5 ½ Ⅻ ²",
    "camelCase PascalCase SCREAMING_SNAKE kebab-case snake_case HTTPServer iPhone15Pro",
    "def f(x: int) -> str:\n    if x >= 10:\n        return f'{x!r:>10}'\n\treturn \"a\\tb\"\n",
    "for(int i=0;i<n;++i){a[i]+=b[i]*c;}//comment\n/* block */ #include <vector>",
    "Der Fluß fließt über die Größe; schöne Mädchen, Ärger, Öl.",
    "C'était l'été où l'élève s'écria: «Où êtes-vous?»",
    "¿Dónde está el niño? ¡Mañana será otro día!",
    "Река берёт начало на холмах. ПРИВЕТ, Мир!",
    "Ο ποταμός πηγάζει από τους λόφους.",
    "河流发源于城镇上方的山丘，流经九十英里。春天，雪融化了！",
    "川は町の上の丘に源を発し、海に達します。カタカナ",
    "강은 마을 위 언덕에서 시작합니다.",
    "ينبع النهر من التلال فوق المدينة.",
    "הנהר נובע מהגבעות שמעל העיר.",
    "😀🎉 👍🏽 👨‍👩‍👧‍👦 🇩🇪 emoji❤️text 🙃!",
    "$5 €10 £20 ¥1000 50% #tag @user a&b c|d ~e^f `code` ... --- === *** !!! ??? <<>> [[x]] {{y}}",
    "https://example.org/path/to?query=1&page=22#anchor info@example.org C:\\Users\\x /usr/bin/env",
    "",
    " ",
    "\n",
    "   ",
    "\n\n\n   \t\n",
    "a",
    "non\u00a0breaking\u2003em\u3000ideographic\u200bzero",
)

# Decomposed letters and combining marks, where runtimes are known to differ from `tokenizers` (NFC, \p{M}).
MARK_TEXTS = (
    "cafe\u0301 u\u0308ber n\u0303 a\u030a",
    "नदी पहाड़ियों से निकलती है",
    "แม่น้ำไหลลงสู่ทะเล",
)
