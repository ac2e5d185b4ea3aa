"""Answers that decline: told from captions of signs that say sorry, and of cats that cannot jump.

A refusal stands at the start of a sentence, outside quotation marks, and in the first person; or it says that there is
no image. Where one is found, the whole answer is one: nothing is cut at the phrase.
"""

from __future__ import annotations

import re

from curate.recaption.wording import unquoted

_CANNOT = r"(?:can ?not|can't|could not|couldn't|will not|won't|do not|don't|am unable to|'m unable to|am not able to)"
_DO = (
    r"(?:assist|help|provide|identify|determine|describe|comply|fulfil+|view|see|access|process|recogni[sz]e|name|"
    r"confirm|answer|generate|create|tell|share|discuss|engage|continue|offer|analy[sz]e|interpret|complete|respond|"
    r"support|caption|give|perceive|disclose|speculate|proceed|produce|feel comfortable|know who|make out|"
    r"have (?:the (?:ability|capability|capacity)|access|enough (?:information|context|detail)|any information)|"
    r"have an? (?:image|picture))"
)
_AN_AI = (
    r"(?:just |only )?(?:an? )?(?:ai\b|artificial intelligence|(?:large )?language model|text-based|virtual assist)"
)
_IMAGE = r"(?:images?|pictures?|photos?|photographs?|attachments?)"
_HERE = r"(?:attached|provided|uploaded|included|shared|given|here|to (?:describe|caption|analy[sz]e))"
_IN_CHAT = r"in (?:your|this|the) (?:message|conversation|chat|request|prompt)"
_SORRY = r"(?:i'?m|i am) (?:(?:very|so|really|truly) )?sorry"
_SEEMS = r"(?:it (?:seems|looks|appears)(?: like| that| as (?:if|though))?,? )?"
_ASIDE = r"(?:(?:unfortunately|regrettably|however|but|please note that|note that|while|although),? )?"
_ASKED = r"(?:please|could you(?: please)?|can you(?: please)?|kindly)"
_NOT_THERE = r"(?: been|n't| not)*"
_NO_CAPTION = r"(?:(?:you (?:have )?|you've )\w+ )?(?:does not|doesn't) have a (?:clear |suitable )?caption"

_STARTS = (
    # English; apostrophes are straight
    rf"{_SORRY}(?:,? but\b|[.!]?$|,? i (?:can|could|am|'m|do|won)|,? for (?:any|the) confusion)",
    rf"{_SORRY}[.,!;] ?(?:i|this|that|the image|there|it|as an|we|your?)\b",
    r"sorry(?:,? but (?:i|this|that|the)\b|[.,!;]? ?(?:i (?:can|could|am\b|do|won)|i'm))",
    r"(?:i apologi[sz]e|my apologies|apologies,? (?:but|for|i))\b",
    rf"{_ASIDE}(?:i|we) ?{_CANNOT} (?:[a-z]+ly |be able to |help but )?{_DO}\b",
    r"(?:unfortunately,? )?i(?: am|'m) (?:unable|not (?:able|allowed|permitted|comfortable|equipped|designed))\b",
    rf"(?:i(?: am|'m)|as) {_AN_AI}",
    r"i (?:must (?:respectfully )?decline|(?:have|need) to decline|refuse to|won't be able)\b",
    r"i(?:'d| would) (?:rather not|prefer not)\b",
    rf"{_SEEMS}there(?: is|'s| was| does)(?: no|n't (?:seem to be )?any?) (?:actual )?{_IMAGE} "
    rf"(?:was |were |is )?(?:{_HERE}|{_IN_CHAT})",
    rf"{_SEEMS}i (?:don't|do not|can't|cannot) (?:actually )?see (?:an?|any|the) {_IMAGE}\b",
    rf"{_SEEMS}(?:you|the user) ?(?:have not|haven't|has not|hasn't|didn't|did not|forgot to) (?:yet |actually )?"
    rf"(?:attach|provide|upload|include|share)",
    rf"{_SEEMS}(?:no|the) {_IMAGE} (?:you \w+ )?(?:was|is|has|seems to have|appears to have|may have|did){_NOT_THERE} "
    rf"(?:attached|provided|uploaded|included|shared|load|come through|fail)",
    rf"{_ASKED} (?:re-?)?(?:provide|upload|share|attach|send|try)\b.{{0,50}}\b(?:{_IMAGE}|url|link|again|file)\b",
    rf"the {_IMAGE} {_NO_CAPTION}",
    rf"(?:this|the|your) (?:{_IMAGE}|content|request) (?:you \w+ )?(?:violates?|goes against|may violate)\b",
    r"(?:that's|that is|this is) (?:not )?something (?:that )?i (?:can|can't|cannot|am|won't)\b",
    r"(?:identifying|recogni[sz]ing|naming|describing) .{0,60} (?:is|are) (?:not )?something (?:that )?i\b",
    r"it (?:is|would be)(?: not)? (?:inappropriate|appropriate|unethical|ethical|against my) (?:for me )?to\b",
    # German
    r"(?:es )?tut mir (?:sehr )?leid\b,? ?(?:aber|ich|das|dieses|dabei|da)\b",
    r"(?:leider )?(?:kann|darf) ich .{0,80}\bnicht\b",
    r"ich (?:kann|darf) .{0,80}\bnicht (?:helfen|beschreiben|sehen|identifizieren|erkennen|beantworten)",
    r"als (?:ki\b|sprachmodell|künstliche intelligenz)",
    # French
    r"(?:je suis )?d[ée]sol[ée]e?,? (?:mais|je|cette)\b",
    r"je ne (?:peux|suis|pourrai|vois|dispose) pas\b",
    r"en tant qu'(?:ia|intelligence artificielle|assistant)",
    # Spanish, Italian, Portuguese
    r"(?:lo siento(?: mucho)?|lamento|disculpa),? (?:pero|no puedo|como)\b",
    r"no (?:puedo|me es posible) (?:ayudar|describir|identificar|proporcionar|ver|procesar|responder|cumplir)",
    r"(?:mi dispiace|spiacente|scusa),? (?:ma|non|come)\b",
    r"non (?:posso|sono in grado) ",
    r"(?:desculpe|sinto muito|lamento|infelizmente),? (?:mas|n[ãa]o|como|eu)\b",
    r"n[ãa]o (?:posso|consigo) (?:ajudar|descrever|identificar|fornecer|ver|processar|responder)",
    # Dutch, Polish, Russian, Turkish, Vietnamese, Indonesian
    r"(?:het )?spijt me\b,? ?(?:maar|ik|dat)\b",
    r"(?:helaas )?(?:kan ik|ik kan) .{0,80}\bniet\b",
    r"(?:przykro mi|przepraszam|niestety),? (?:ale )?nie (?:mogę|jestem)",
    r"(?:извините|к сожалению|простите|прошу прощения),? (?:но )?(?:я|мне|это)\b",
    r"я не могу (?:помочь|описать|определить|предоставить|ответить|выполнить|видеть)",
    r"(?:üzgünüm|maalesef|özür dilerim)[,.]? (?:ama|ancak|ben|bu)\b",
    r"(?:xin lỗi|rất tiếc),? (?:nhưng )?tôi\b",
    r"(?:maaf|mohon maaf),? (?:tetapi |tapi |namun )?(?:saya|kami)\b",
    # Chinese, Japanese, Korean, Arabic, Hindi
    r"(?:非常|很|真的)?(?:抱歉|对不起|對不起|不好意思)[，,。！]?\s*(?:但|不过|我|作为|作為|由于|由於|该|該|这|這)",
    r"(?:作为|作為)(?:一个|一個)?(?:ai|人工智能|人工智慧|语言模型|語言模型)",
    r"我(?:无法|無法|不能)(?:提供|帮助|幫助|协助|協助|识别|識別|描述|满足|回答|查看|看到)",
    r"(?:大変)?(?:申し訳(?:ありません|ございません|ない)が?|すみませんが)",
    r"죄송(?:합니다|하지만|스럽지만)|미안하지만",
    r"(?:عذر[اًا]+|آسف|أعتذر|للأسف)\b",
    r"(?:मुझे खेद है|क्षमा करें|माफ़? ?कीजिए|माफ़? करें)",
)
_LABEL = r"(?:(?:\w+ )?(?:caption|description|answer|response): ?)?"
_REFUSAL = re.compile(_LABEL + "(?:" + "|".join(_STARTS) + ")", re.IGNORECASE)
_NEXT = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")


def is_refusal(text: str) -> bool:
    """Whether a sentence of an answer, outside quotation marks, declines."""
    bare = unquoted(text.replace("’", "'").replace("´", "'"))
    return any(_REFUSAL.match(sentence.strip(" \t*_-–—•>#:")) for sentence in _NEXT.split(bare))
