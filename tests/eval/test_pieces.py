from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engram.training.tokenizer import EOS, train_bpe
from eval.shared.pieces import Pieces

TEXT = "naïve — 🙂 日本\n\tfoo\u00a0bar"


def test_pieces_of_byte_tokens_are_the_text_and_half_characters_are_spelt_as_bytes() -> None:
    tokenizer = train_bpe(["naïve naïve naïve foo foo"], 300)
    ids = tokenizer.encode(TEXT).ids
    pieces = Pieces(tokenizer)(ids)
    assert "\\xf0" in pieces  # the smile was never seen in training: four tokens
    assert "ï" in "".join(pieces)
    # Undone by Python's own reading of such escapes, the pieces are the bytes of the text.
    spelt = [piece.encode("latin-1", "backslashreplace").decode("unicode_escape") for piece in pieces]
    whole = b"".join(
        text.encode("latin-1") if piece.startswith("\\x") else text.encode()
        for piece, text in zip(pieces, spelt, strict=True)
    )
    assert whole == TEXT.encode()


def test_special_tokens_and_ids_without_a_token_have_a_text() -> None:
    tokenizer = train_bpe(["foo"], 300)
    assert Pieces(tokenizer)([tokenizer.token_to_id(EOS), 5000]) == [EOS, "<unused id 5000>"]


def test_spaces_that_a_decoder_drops_at_a_texts_start_are_shown() -> None:
    vocabulary = {"▁foo": 0, "bar": 1, "<0xE2>": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    assert Pieces(tokenizer)([0, 1, 2]) == [" foo", "bar", "<0xE2>"]
