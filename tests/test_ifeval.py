"""IFEval's 25 kinds of instruction: cases by hand, official verdicts, bad arguments."""

import pytest
from tiny import SHARED, needs_data

from data import UserError, read_log
from eval import CHECKS, count_sentences, ifeval_verdicts, is_language

LESS, LEAST = "less than", "at least"
NTH = {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Moon"}
CASES = [  # kind, arguments, texts that follow it, texts that do not
    ("change_case:capital_word_frequency", {"capital_frequency": 3, "capital_relation": LEAST},
     ["BIG RED fox I", "IT'S A-B", "ONE,TWO:THREE", "U.S. AND/OR UK."], ["Big RED FOX", "1 2 3 !"]),
    ("change_case:english_capital", {}, ["THE CAT IS ON THE MAT. 1!"],
     ["THE CAT IS On THE MAT", "123", "DIE KATZE IST NICHT AUF DEM DACH UND SCHLÄFT"]),
    ("change_case:english_lowercase", {}, ["the cat is on the mat. 1!"], ["The cat is on the mat"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": " Say (this). "}, ["say (THIS). Done"],
     ["I say (this).", "Say this."]),
    ("combination:two_responses", {}, ["a******b", "******a\n******\nb******", "a ******* b"],
     ["a****** a ", "a******b******c", "a************b", "a ***** b"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b]", "[[a] [b]]"],
     ["[a]", "[a\n] [b]", "a] [b"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["bye\nP.S. x", "p. s. x"],
     ["bye\nPS x", "P.P.S x", "p.  s."]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["p. p. s", "P.P.S."],
     ["P.S. x", "PPS"]),
    ("detectable_content:postscript", {"postscript_marker": "Note"}, ["a NOTE"], ["a not"]),
    ("detectable_format:constrained_response", {}, ["So: My answer is maybe. Ok"],
     ["my answer is yes.", "My answer is yes", "Yes"]),
    ("detectable_format:json_format", {}, ['{"a": 1}', "```json\n[1]\n```", " 3 ", "```\n3\n```"],
     ["{'a': 1}", "Here: {}", "```python\n1\n```", "[1] x"]),
    ("detectable_format:multiple_sections", {"section_spliter": " Section ", "num_sections": 2},
     ["Section 1 a Section 2", "Section1\nSection\n2"],
     ["SECTION 1 SECTION 2", "Section 1", "Section  1 Section  2"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2},
     ["* a\n* b", "- a\n\n  - b", "*a\n--- ", "*a* b\n * c", "*\n- a"],
     ["* a", "* a\n* b\n* c", "** a\n** b", "1. a\n2. b", "x * a\ny * b", "*\n* a"]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2},
     ["*a* *b*", "**a** b **c**", "*a*b*c*"], ["**a**", "* * *b*", "*a\nb* c", "__a__ _b_"]),
    ("detectable_format:title", {}, ["<<a>>", "x <<< a >>", "<<a> b>>"],
     ["<a>", "<< >>", "<<a\n>>"]),
    ("keywords:existence", {"keywords": ["cat", "a.b"]}, ["CATS a.b", "concat A.Bc"],
     ["cat", "c at a.b", "cat axb"]),
    ("keywords:existence", {"keywords": ["c++", "(a"]}, ["C++ (a)"], ["ccc (a)", "c++ a"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat", "dog house"]},
     ["cats dog", "concat", "dog  house"], ["the Cat.", "a dog house", "cat-like"]),
    ("keywords:frequency", {"keyword": " ha ", "frequency": 3, "relation": LEAST},
     ["hahaHA", "that has Ha"], ["ha ha", "h a"]),
    ("keywords:frequency", {"keyword": "why?", "frequency": 2, "relation": LESS}, ["why why?"],
     ["why? Why?"]),
    ("keywords:letter_frequency", {"letter": "A", "let_frequency": 2, "let_relation": LEAST},
     ["aA", "banana"], ["a"]),
    ("language:response_language", {"language": "de"}, ["Das ist nicht die Katze.", "123 !"],
     ["This is the cat."]),
    ("length_constraints:nth_paragraph_first_word", NTH, ["Sun\n\nmoon, x", "a\n\n'\"Moon's\n\n"],
     ["moon", "moon\n\nsun", "a\n\nmoon\n\nb", "a\n\nmoons", "a\nmoon", "a\n\n\n\nmoon"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2},
     ["a\n***\nb", "***a***b", "a *** b ***"], ["a\n\nb", "a***b***c", "a***\n***b"]),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": LEAST},
     ["One. Two! Three?", "One. two. three."], ["Dr. Smith is in. Ok.", "1.5 is it. So"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": LEAST},
     ["a b c", "it's ok", "a-b_c d"], ["a_b c"]),
    ("punctuation:no_comma", {}, ["a; b", "a، b"], ["a, b", "1,000"]),
    ("startend:end_checker", {"end_phrase": " The End. "}, ["x the end.", '"x The End."\n'],
     ["The End. x", "The End"]),
    ("startend:quotation", {}, [' "a" ', '""'], ['"', '"a', "'a'", "“a”", 'a "b"']),
]


def strict(text, kind, arguments):
    return ifeval_verdicts(text, [kind], [arguments])[0][0]


@pytest.mark.parametrize("kind, arguments, right, wrong", CASES)
def test_cases(kind, arguments, right, wrong):
    assert [text for text in right if not strict(text, kind, arguments)] == []
    assert [text for text in [*wrong, "", " \n"] if strict(text, kind, arguments)] == []


def test_every_kind_has_cases():
    assert len(CHECKS) == 25 and set(CHECKS) == {case[0].partition(":")[2] for case in CASES}


SENTENCES = [
    ("Hello", 1), ("Hello.", 1), ("Hello. World", 2), ("Hello.World", 1), ("Wait... what? No!", 2),
    ("He left at 5 p.m. on Monday.", 1), ("Mr. and Mrs. Lee met J. Doe of Acme Inc. in May.", 1),
    ("1. One thing\n2. Two things", 3), ("1. one 2. two", 1), ("Plan B. So we go.", 2),
    ('He said "Go." Then he left.', 2), ('"Go."', 1), ("(Go.) (Stop.)", 2), ("What?! Why?", 2),
    ("**Go.** Then", 2), ('{"a": "One.", "b": "Two."}', 2), ("That is, e.g. this", 2),
    ("It costs 3.5, i.e., nothing", 1)]


@pytest.mark.parametrize("text, count", SENTENCES)
def test_sentences(text, count):
    assert count_sentences(text) == count


LANGUAGE = {
    "en": "We went to the sea and it was cold.",
    "es": "El perro duerme en la casa y no quiere salir.",
    "pt": "Não sei se a menina vai para a escola com o irmão.",
    "fr": "Je ne sais pas où est le chat de la voisine.",
    "de": "Ich weiß nicht, ob der Hund im Garten ist.",
    "it": "Non so dove sono i libri della ragazza.",
    "pl": "Nie wiem, gdzie się podział mój stary kapelusz.",
    "vi": "Tôi không biết con mèo đang ở đâu.",
    "sw": "Watoto wanacheza katika bustani ya shule na walimu wao.",
    "fi": "Koira on talossa, mutta kissa ei ole siellä.",
    "ru": "Я не знаю, где он купил эту книгу.", "uk": "Я не знаю, де він купив цю книжку.",
    "bg": "Не знам къде е книгата, която той купи.", "ar": "لا أعرف أين ذهب الولد في الصباح.",
    "fa": "من نمی دانم که او کجا رفته است.", "ur": "مجھے نہیں معلوم کہ وہ کہاں گیا ہے۔",
    "hi": "मुझे नहीं पता कि वह कहाँ गया है।", "mr": "मला माहीत नाही की तो कुठे गेला आहे.",
    "ne": "मलाई थाहा छैन ऊ कहाँ गयो, तर घर यहाँ छ।", "he": "אני לא יודע איפה הספר.",
    "bn": "আমি জানি না সে কোথায়।", "pa": "ਮੈਨੂੰ ਨਹੀਂ ਪਤਾ ਉਹ ਕਿੱਥੇ ਹੈ।",
    "gu": "મને ખબર નથી તે ક્યાં છે.", "ta": "அவன் எங்கே என்று தெரியவில்லை.",
    "te": "అతను ఎక్కడ ఉన్నాడో నాకు తెలియదు.", "kn": "ಅವನು ಎಲ್ಲಿದ್ದಾನೆ ಎಂದು ನನಗೆ ಗೊತ್ತಿಲ್ಲ.",
    "ml": "അവൻ എവിടെയാണെന്ന് എനിക്കറിയില്ല.", "th": "ฉันไม่รู้ว่าเขาอยู่ที่ไหน",
    "ja": "彼がどこにいるのか分かりません。", "ko": "그가 어디에 있는지 모르겠어요."}


@pytest.mark.parametrize("language", LANGUAGE)
def test_language(language):
    assert [name for name in LANGUAGE if is_language(LANGUAGE[language], name)] == [language]
    assert is_language(LANGUAGE[language] + " (AI, example.com)", language)


def test_language_without_words():
    assert is_language("12:30 !?", "th") and is_language("Grand tour", "en")
    assert not is_language("etchings", "en") and not is_language("Tom Anna " * 9, "en")
    assert not is_language("Καλημέρα", "en") and not is_language("你好", "ja")


LOOSE = [
    ("punctuation:no_comma", {}, "Hi, you\na\nBye, x", True),
    ("punctuation:no_comma", {}, "a\nb, c\nd", False),
    ("startend:quotation", {}, 'Sure:\n\n\n  *"a"* \n\nBye', True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "- a\n- b", True),
    ("keywords:existence", {"keywords": ["ab"]}, "a*b", True),
    ("length_constraints:number_words", {"num_words": 9, "relation": LESS}, "", False)]


@pytest.mark.parametrize("kind, arguments, text, verdict", LOOSE)
def test_loose(kind, arguments, text, verdict):
    assert ifeval_verdicts(text, [kind], [arguments]) == ([False], [verdict])


def test_several_instructions():
    kinds = ["punctuation:no_comma", "keywords:letter_frequency"]
    arguments = [{"keywords": None, "num_words": None},
                 {"letter": "a", "let_frequency": 2, "let_relation": LEAST}]
    assert ifeval_verdicts("x, y\naa", kinds, arguments) == ([False, True], [True, True])


@needs_data
def test_official_verdicts():
    rows, different = read_log(f"{SHARED}/ifeval/half_with_official_verdicts.jsonl"), []
    total = 0
    for row in rows:
        verdicts = ifeval_verdicts(row["response"], row["instruction_id_list"], row["kwargs"])
        total += len(row["kwargs"])
        for i, pair in enumerate(zip(*verdicts)):
            if pair != (row["official_strict"][i], row["official_loose"][i]):
                different.append((row["key"], row["instruction_id_list"][i]))
    assert total == 427 and different == []


BAD = [
    ("keywords:exist", {}, "keywords:exist"),
    ("punctuation:no_comma", {"comma": 1}, "'comma': 1"),
    ("length_constraints:number_words", {"num_words": 3}, "'relation'"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at most"}, "at most"),
    ("language:response_language", {"language": "xx"}, "'xx'")]


@pytest.mark.parametrize("kind, arguments, named", BAD)
def test_bad_instructions_are_named(kind, arguments, named):
    with pytest.raises(UserError, match=named):
        ifeval_verdicts("a", [kind], [arguments])


@pytest.mark.parametrize("piece", ["\n", " ", "*", "-", "[", "<<", ">>", "***", "a", "A.B", "Hi! ",
                                   "!", "अ", "```", "Section ", "p. ", "\ud800", "://", "\n*"])
def test_endless_repetition(piece):
    """Models do get stuck; a quadratic pattern would hang here. No kind fails on odd characters."""
    kinds, arguments = zip(*{case[0]: case[1] for case in CASES}.items())
    strict, loose = ifeval_verdicts(piece * (200_000 // len(piece)), kinds, arguments)
    assert len(strict) == len(loose) == 25
