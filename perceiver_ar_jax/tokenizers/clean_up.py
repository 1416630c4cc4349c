"""Hugging Face's clean-up of decoded English: no blank before punctuation and contractions."""

REPLACEMENTS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def clean_up(text: str) -> str:
    """Each replacement over the whole text, in order.

    Source: transformers, `PreTrainedTokenizerBase.clean_up_tokenization`.
    """
    for old, new in REPLACEMENTS:
        text = text.replace(old, new)
    return text
