"""Token tables made up for the tests, with numbers that are easy to tell apart."""

import numpy as np
import pandas as pd

from rllib_distrl.method.token_table import TokenTable

HOSTILE = [
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 2">',
    "</script><script>window.hacked = 3</script><!--",
    "&lt;b&gt; ${window.hacked = 4} `{{INDEX}}` \\u003cscript\\u003e",
    "\x00\x01\x07\x1b[31m\x7f \u202eevil\u202c \u2028 line\r\nend\ttab",
    "שלום עולם, מה שלומך",
    "三加七等于十，十乘以三等于三十",
    "😀👩‍👩‍👧 e\u0301",
    "",
    "x" * 1_000_000,
]


def make_table(
    completions=6,
    tokens=5,
    n_quantiles=4,
    n_top=3,
    generations=3,
    seed=0,
    texts=None,
    replies=None,
):
    """Completions of `tokens` tokens; token t of completion c reads "c<c>t<t> ".

    `replies` are those of each completion: (after how many tokens, text).
    """
    rng = np.random.default_rng(seed)
    rows = []
    for c in range(completions):
        pieces = texts[c] if texts is not None else [f"c{c}t{t} " for t in range(tokens)]
        n = len(pieces)
        quantiles = np.sort(rng.uniform(0, 1, (n, n_quantiles)), axis=1).astype(np.float32)
        correct = c % 3 == 0
        rows.append(
            {
                "problem": c // generations,
                "row": 10 + c // generations,
                "sample": c % generations,
                "prompt": f"prompt {c // generations}",
                "completion": "".join(pieces),
                "score": float(correct),
                "status": "correct" if correct else "wrong",
                "finish_reason": "length" if c % 3 == 2 else "stop",
                "answer": f"answer {c}" if correct else None,
                "token": np.arange(n, dtype=np.int32) + 100 * c,
                "text": pieces,
                "logp": np.full(n, -0.25 - c / 64, np.float32),
                "entropy": np.linspace(0.25, 1, n, dtype=np.float32),
                "value": quantiles.mean(1),
                "quantiles": quantiles.ravel(),
                "bonus": np.full(n, c / 8, np.float32),
                "advantage": np.linspace(-0.5, 0.5, n, dtype=np.float32),
                "advantage_used": np.linspace(-2, 2, n, dtype=np.float32),
                "logp_difference": np.full(n, 0.125, np.float32),
                "top_ids": np.tile(np.arange(n_top, dtype=np.int32), n),
                "top_texts": ["first", "second", "third"][:n_top] * n,
                "top_logps": np.tile(np.log([0.5, 0.25, 0.125][:n_top]), n).astype(np.float32),
            }
        )
    if replies is not None:
        for row, said in zip(rows, replies, strict=True):
            row["reply_at"] = np.array([at for at, _ in said], np.int32)
            row["reply_texts"] = [text for _, text in said]
    return TokenTable(pd.DataFrame(rows), {"algorithm": "DistRL", "iteration": 7})
