"""Answers as models give them (BLIP-2, LLaVA, Qwen-VL, CogVLM, Florence-2, InternVL, GPT-4V, Gemini), written by
hand, and what is to be read from each.

Of each: the answer, the outcome, and the caption where that is not the answer as it stands; then what else the server
or the recipe says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DESCRIBE = "Describe the image in detail."
SAME = "\0"


@dataclass(frozen=True)
class Case:
    """An answer, and what is to come of it."""

    text: str | None
    outcome: str
    caption: str | None
    finish: str | None
    prompt: str
    alt: str | None
    language: str | None


def case(
    text: str | None, outcome: str = "ok", caption: str | None = SAME, finish: str | None = "stop", **rest: Any
) -> Case:
    """A case; the caption is by default the answer as it stands, and None where the outcome has none."""
    if caption == SAME:
        caption = text if outcome in ("ok", "copied", "truncated") else None
    known = {"prompt": DESCRIBE, "alt": None, "language": "en", **rest}
    return Case(text, outcome, caption, finish, **known)


LONG = (
    "A weathered wooden fishing boat, painted in faded shades of blue and white, rests on a pebbled shore at low "
    "tide. Coils of rope and a bright orange buoy lie in its bow. Behind it, a calm grey sea stretches to a horizon "
    "veiled in mist, and two gulls circle over a distant lighthouse. The light is soft and even, as "
    "on an overcast morning."
)
LIST_LIKE = (
    "On the shelf, from left to right, stand a red mug, a blue mug, a green mug, a yellow mug and a white mug, each "
    "with a handle that points to the right. Below them hang a red towel, a blue towel and a green towel."
)

GOOD = [
    # BLIP, BLIP-2, GIT: lower case, no full stop
    case("a dog running on the beach"),
    case("two people riding bicycles down a street"),
    case("a close up of a pizza on a table"),
    case("a black and white photo of a man in a hat"),
    case("there is a cat that is sitting on a window sill"),
    case("a bowl of ramen with egg, nori and pork"),
    case("someone is holding a cell phone in their hand"),
    case("a group of people standing around a table with food and drinks on it"),
    case("a photograph of a red vintage car parked in front of a building", prompt="a photograph of"),
    case("a photo of a man riding a wave on top of a surfboard", prompt="a photo of"),
    case("painting of a woman in a blue dress by the sea"),
    case("smiling woman with a dog in the park"),
    case("cat"),
    case("a cat"),
    case("sunset"),
    case("purple flowers"),
    case("a stop sign"),
    case("A cat sitting on a mat", finish=None),
    case("a very very very tall building in a city"),
    case("A bowl of food with a spoon in it", finish="eos"),
    # LLaVA, CogVLM, Qwen-VL, InternVL: prose
    case(LONG),
    case(LIST_LIKE),
    case(LONG, finish=None),
    case("A young woman in a red coat crosses a snowy street, carrying a bag of groceries. Behind her a tram waits."),
    case("The painting depicts a stormy sea with a three-masted ship."),
    case("This painting shows a woman who holds a pitcher, in the manner of Vermeer."),
    case("The black and white image shows a steam locomotive on a bridge."),
    case("The image is divided into four panels, each of which shows the same tree in another season."),
    case("The poster features bold yellow letters on a purple ground."),
    case("The photo album lies open on a wooden table."),
    case("The image of the Virgin Mary stands in a niche above the altar."),
    case("The picture frame on the wall is empty."),
    case("This map shows the railway lines of Switzerland in 1910."),
    case("A screenshot of a spreadsheet with four columns: name, date, amount and total."),
    case("A close-up of a hand-written note on yellow paper, pinned to a cork board."),
    case("In the center of the image, a lighthouse stands on a cliff."),
    case("In the background, snow-capped mountains rise over a lake."),
    case("A man of about 40 wears a dark suit; he cannot be seen from the front."),
    case("Here lies a ruined abbey, its walls covered with ivy."),
    case("Great Wall of China winding over green hills under a hazy sky."),
    case("Sure-footed mountain goats climb a steep, rocky slope."),
    case("Captions run along the bottom of a film still that shows two men in a car."),
    case("Title page of an old book, with an engraving of a compass."),
    # hard negatives of refusals
    case("A cat that cannot reach the fish on the counter stretches out a paw."),
    case('A handwritten sign on a shop door reads "I\'m sorry, we are closed today".'),
    case('A card with the words "I\'m sorry" and a teddy bear that holds a heart.'),
    case('"I\'m sorry" is written in pink icing on a round cake.'),
    case("“I'm sorry, but I can't help it” is printed across the front of a white T-shirt."),
    case("A meme of a dog with the caption 'I'm sorry, I can't hear you over the sound of my own barking'."),
    case('A cartoon robot says: "As an AI language model, I cannot feel pain."'),
    case("Sorry board game box with four coloured pawns on a white table."),
    case("I can't believe it's not butter tub on a kitchen counter"),
    case("I love New York T-shirt on a hanger"),
    case("A sign says that dogs are not allowed on the beach."),
    case("A man apologises to a woman with a bunch of flowers on a doorstep."),
    case("An old radio that does not work any more, on a shelf full of dust."),
    case('A grey placeholder with the words "No image available" and a crossed-out camera.'),
    case("No entry sign on a red brick wall"),
    case("No people are visible on the empty beach."),
    case("There is no snow on the summit, but clouds gather around it."),
    case("There are no images on the gallery's white walls, only empty hooks."),
    case("A woman who is unable to walk sits in a wheelchair and plays basketball."),
    case("Please do not feed the ducks sign beside a pond"),
    case("It is not possible to read the label on the dark bottle, whose paper is torn."),
    case('A poster that says "Please upload your photo here" over an empty frame.'),
    case("Unfortunately Named Road is what the street sign in this photo says."),
    case("You can't park here sign on a garage door"),
    case("A book cover: Lo siento, no hablo español, a phrase book for travellers.", caption=SAME),
    case("A policeman helps an old man who can't cross the road; cars wait."),
    # signs that repeat, list, and hold what looks like markup
    case('A neon sign that reads "HA HA HA HA HA HA HA HA" over a bar.'),
    case('A Christmas card says "Ho ho ho ho ho ho!" in gold letters.'),
    case('A menu board lists "1. Coffee 2. Tea 3. Cocoa" in white chalk.'),
    case("A phone shows the number 0000000000 on its screen."),
    case("A price tag shows 3 * 4 = 12 beside a snake_case_name in green letters."),
    case("Row after row after row of vines climbs a hill under a pale sky."),
    case("A red car, a red bus and a red bicycle wait at a red light."),
    case("A barcode above the digits 111111111111 on a carton."),
    case('A business card template reads "[Your Name]" and "[Your Title]" in grey.'),
    case("A name tag that says [illegible] hangs on a blue ribbon."),
    case("A T-shirt with the HTML tag “<body>” printed on its front."),
    case("A keyboard with the keys < and > worn off."),
    case("A clock shows 10:09; below it stands: user manual, page 4."),
    case("A plate of spaghetti alla puttanesca with capers and olives."),
    case("A Fjällräven Kånken backpack in ochre on a bench."),
    case("A bottle of Château Margaux 1995 Grand Cru Classé on a table."),
    case("The sign reads „Vorsicht, bissiger Hund, Betreten des Grundstücks verboten“ in red letters."),
    case("Sushi, sashimi, nigiri, maki, tempura and miso soup"),
    case("Yamaha Ténéré 700 Rally motorcycle"),
    case("Mont Saint-Michel, Normandy"),
    case("La Sagrada Família, Barcelona"),
    case("Bouillabaisse"),
    case("Schloss Sanssouci, Potsdam"),
    case("Alfa Romeo Giulia Quadrifoglio"),
    case("Neuschwanstein Castle in Bavaria at sunset"),
    case('"Stop" and "Go" are painted on two sides of a paddle, "Wait" on the handle, and nothing on "Back"'),
    case("Tom & Jerry, a cat and a mouse, chase each other around a table."),
    case("An iPhone beside an open MacBook on a desk."),
    case("A jar labelled Mrs. Smith's Jam No. 4 stands on a shelf", finish=None),
    case("The Eiffel Tower at night, lit in gold, seen from the Trocadéro.", alt="Eiffel Tower"),
    case("A red car", alt="a red car"),
    case("A red car parked on a street.", alt="A red car parked"),
    # in other languages, where these are wanted or any is
    case("Ein Hund läuft am Strand entlang und trägt einen Stock im Maul.", language="de"),
    case("一只橘猫坐在窗台上，看着外面的雨。", language="zh"),
    case("Un perro corre por la playa con un palo en la boca.", language=None),
    case("Una señal que dice «no puedo ayudar» cuelga de la puerta de un bar.", language="es"),
    case("Ein Schild mit der Aufschrift „Es tut mir leid, ich kann dir nicht helfen“ hängt an der Tür.", language="de"),
    # what the recipe asks for in another form
    case('{"caption": "A cat", "objects": ["cat", "mat"]}', prompt="Answer in JSON with caption and objects."),
    case("dog, beach, sunset, waves", prompt="List the objects as tags, with commas."),
]

CHANGED = [
    # openings
    case("The image shows a dog running on the beach.", caption="A dog running on the beach."),
    case("This image features a woman in a red coat.", caption="A woman in a red coat."),
    case("The image depicts two men who play chess.", caption="Two men who play chess."),
    case("This image captures the quiet of a winter forest.", caption="The quiet of a winter forest."),
    case("This image displays: A lighthouse on a cliff.", caption="A lighthouse on a cliff."),
    case("The photo shows an iPhone on a desk.", caption="An iPhone on a desk."),
    case("The image shows iPhone cases in five colours.", caption="iPhone cases in five colours."),
    case("the image shows a small boat", caption="a small boat"),
    case("In this image, there is a cat on a sofa.", caption="There is a cat on a sofa."),
    case("In the image we can see a market full of fruit.", caption="A market full of fruit."),
    case("In this picture, a boy flies a kite.", caption="A boy flies a kite."),
    case("We can see a red barn in a field of wheat.", caption="A red barn in a field of wheat."),
    case("This is an image of a blue vase with tulips.", caption="A blue vase with tulips."),
    case("This is a black and white photograph of a pier.", caption="A black and white photograph of a pier."),
    case("An image of a bridge over a river.", caption="A bridge over a river."),
    case("The image is a watercolour of a harbour.", caption="A watercolour of a harbour."),
    case("Caption: A lone tree on a hill.", caption="A lone tree on a hill."),
    case("**Caption:** A lone tree on a hill.", caption="A lone tree on a hill."),
    case("Detailed description: A lone tree on a hill.", caption="A lone tree on a hill."),
    case("A suitable caption might be: A lone tree on a hill.", caption="A lone tree on a hill."),
    case('The caption for this image could be "A lone tree on a hill."', caption="A lone tree on a hill."),
    case("Sure! Here is a caption for the image:\n\nA lone tree on a hill.", caption="A lone tree on a hill."),
    case(
        'Sure, here\'s a detailed description of the image:\n\n"A lone tree on a hill."',
        caption="A lone tree on a hill.",
    ),
    case("Certainly! The image shows a lone tree on a hill.", caption="A lone tree on a hill."),
    case("Here’s a description of the image:\n\nThe image depicts a lone tree.", caption="A lone tree."),
    case("Here is a detailed caption: This image shows a lone tree.", caption="A lone tree."),
    # closing remarks
    case("A lone tree on a hill. Let me know if you'd like more detail!", caption="A lone tree on a hill."),
    case("A lone tree on a hill.\n\nWould you like me to make it shorter?", caption="A lone tree on a hill."),
    case("A lone tree on a hill.\n\nI hope this helps! 😊", caption="A lone tree on a hill."),
    # quotation marks
    case('"A lone tree on a hill."', caption="A lone tree on a hill."),
    case("“A lone tree on a hill”", caption="A lone tree on a hill"),
    case("'A dog's bowl on the floor'", caption="A dog's bowl on the floor"),
    # Markdown and lists
    case("A **red** car on a *wet* road.", caption="A red car on a wet road."),
    case("## Description\n\nA red car on a wet road.", caption="A red car on a wet road."),
    case("# Red car\nA red car on a wet road.", caption="Red car: A red car on a wet road."),
    case("```\nA red car on a wet road.\n```", caption="A red car on a wet road."),
    case("The image contains:\n- a red car\n- a wet road\n- two trees", caption="A red car, a wet road, two trees"),
    case(
        "1. A red car stands on a wet road.\n2. Two trees line the road",
        caption="A red car stands on a wet road. Two trees line the road",
    ),
    case(
        "**Subject:** A red car on a road.\n\n**Background:** Two trees and a barn.",
        caption="Subject: A red car on a road. Background: Two trees and a barn.",
    ),
    case("**Mood:** calm\n**Setting:** a garden", caption="Mood: calm. Setting: a garden"),
    case("- dog\n- beach\n- sunset", caption="dog, beach, sunset", prompt="List tags."),
    case(
        'Here are three captions for the image:\n\n1. "A red car waits in the rain."\n2. Lonely road.\n3. Autumn.',
        caption="A red car waits in the rain.",
    ),
    case(
        "Here are a few options:\n\n**Option 1 (short):** A red car waits.\n**Option 2 (long):** A red car in rain.",
        caption="A red car waits.",
    ),
    case("A red car.\n\nThe road is wet.", caption="A red car. The road is wet."),
    case('{"caption": "A red car on a wet road."}', caption="A red car on a wet road."),
    case('```json\n{"description": "A red car on a wet road.", "score": 4}\n```', caption="A red car on a wet road."),
    # tokens, thinking, characters
    case("A red car on a wet road.<|im_end|>", caption="A red car on a wet road."),
    case("</s><s>A red car on a wet road.</s><pad><pad>", caption="A red car on a wet road."),
    case("<|im_start|>assistant\nA red car on a wet road.", caption="A red car on a wet road."),
    case("ASSISTANT: A red car on a wet road.", caption="A red car on a wet road."),
    case("USER: Describe the image in detail. ASSISTANT: A red car on a road.", caption="A red car on a road."),
    case("Describe the image in detail.\nA red car on a wet road.", caption="A red car on a wet road."),
    case("<think>The user wants a caption. I cannot see who it is.</think>\n\nA red car.", caption="A red car."),
    case("The user wants it short. So: a car.\n</think>\n\nA red car on a road.", caption="A red car on a road."),
    case("◁think▷A car?◁/think▷A red car on a road.", caption="A red car on a road."),
    case("<think>Hm.</think><answer>A red car on a road.</answer>", caption="A red car on a road."),
    case("<|begin_of_box|>A red car on a road.<|end_of_box|>", caption="A red car on a road."),
    case("A red\u200b car\x00 on a road.\ufffd", caption="A red car on a road."),
    case("  A red  car\non a\troad. ", caption="A red car on a road."),
    case("Tom &amp; Jerry chase each other.<br>", caption="Tom & Jerry chase each other."),
    case("arafed image of a man in a suit", caption="image of a man in a suit"),
    case("araffe woman in a red dress", caption="woman in a red dress"),
]

TRUNCATED = [
    case("A red car on a wet road, beside which two", "truncated", finish="length"),
    case(LONG[:179], "truncated", finish=None),
    case(LONG, "truncated", finish="length"),
    case("The image shows a red car on a wet", "truncated", "A red car on a wet", finish="length"),
    case("<think>The user wants a caption of the image. First I look at", "truncated", None, finish="length"),
    case("", "truncated", None, finish="length"),
    case(
        "**Subject:** A red car on a road. **Backgr",
        "truncated",
        "Subject: A red car on a road. Backgr",
        finish="length",
    ),
]

COPIED = [
    case(
        "Vintage 1967 Ford Mustang for sale in Austin Texas.",
        "copied",
        alt="Vintage 1967 Ford Mustang for sale in Austin, Texas",
    ),
    case(
        "The image shows Bride and groom on their wedding day at the lake",
        "copied",
        "Bride and groom on their wedding day at the lake",
        alt="bride and groom on their wedding day at the lake - photo by S.",
    ),
]

REFUSED = [
    case(text, "refused", **rest)  # type: ignore[arg-type]
    for text, rest in [
        ("I'm sorry, but I can't assist with that.", {}),
        ("I'm sorry, but I can't help with that request.", {}),
        ("I’m sorry, I can’t help with identifying people in images.", {}),
        ("Sorry, I can't assist with that.", {}),
        ("Sorry, but I cannot describe this image.", {}),
        ("I'm really sorry, but this image contains content that I can't discuss.", {}),
        ("I cannot provide a description of this image.", {}),
        ("I can't identify the person in this image, but I can describe it: a man in a suit stands at a podium.", {}),
        ("I'm unable to view images directly.", {}),
        ("I am not able to process images.", {}),
        ("As an AI language model, I don't have the ability to see images.", {}),
        ("As a text-based AI, I can only read text.", {}),
        ("I'm just a language model, so I can't help you with that.", {}),
        ("I apologize, but I am unable to generate a caption for this image.", {}),
        ("Unfortunately, I cannot describe images of this kind.", {}),
        ("I won't describe this image, as it shows a private person.", {}),
        ("I must respectfully decline to describe it.", {}),
        ("I'm not comfortable describing this image.", {}),
        ("I don't see any image attached to your message.", {}),
        ("It seems that there is no image attached. Please upload the image.", {}),
        ("It looks like you didn't attach an image.", {}),
        ("No image was provided.", {}),
        ("Please provide the image you would like me to describe.", {}),
        ("The image you have provided does not have a clear caption.", {}),
        ("**I'm sorry**, but I can't help with that.", {}),
        ("A man in a suit stands at a podium. I cannot identify the person from the image.", {}),
        ("Caption: I'm sorry, I can't help with that.", {}),
        ("<think>Is this allowed?</think>I'm sorry, but I can't describe this image.", {}),
        ("I'm sorry, but I can't assist with that", {"finish": "length"}),
        ("This image violates our content policy.", {}),
        ("There doesn't seem to be an image attached to your message.", {}),
        ("Identifying real people from photos is not something I can do.", {}),
        ("Lamento, no puedo describir esta imagen.", {}),
        ("Es tut mir leid, aber ich kann dieses Bild nicht beschreiben.", {}),
        ("Leider kann ich das Bild nicht sehen.", {}),
        ("Je suis désolé, mais je ne peux pas décrire cette image.", {}),
        ("Désolé, je ne peux pas vous aider.", {}),
        ("Lo siento, pero no puedo ayudar con eso.", {}),
        ("No puedo identificar a las personas en la imagen.", {}),
        ("Mi dispiace, ma non posso descrivere questa immagine.", {}),
        ("Desculpe, mas não posso ajudar com isso.", {}),
        ("Het spijt me, maar ik kan deze afbeelding niet beschrijven.", {}),
        ("Przykro mi, ale nie mogę opisać tego obrazu.", {}),
        ("Извините, но я не могу описать это изображение.", {}),
        ("К сожалению, я не могу помочь с этим.", {}),
        ("Üzgünüm, ancak bu görüntüyü tanımlayamam.", {}),
        ("Xin lỗi, tôi không thể mô tả hình ảnh này.", {}),
        ("Maaf, saya tidak dapat membantu.", {}),
        ("抱歉，我无法描述这张图片。", {}),
        ("很抱歉，我不能协助满足该请求。", {}),
        ("作为一个人工智能语言模型，我无法查看图片。", {}),
        ("申し訳ありませんが、この画像を説明することはできません。", {}),
        ("죄송하지만 이 이미지를 설명할 수 없습니다.", {}),
        ("عذرًا، لا أستطيع وصف هذه الصورة.", {}),
        ("मुझे खेद है, मैं इस छवि का वर्णन नहीं कर सकता।", {}),
    ]
]

EMPTY = [
    case(text, "empty")
    for text in ("", None, "  \n", "...", "N/A", "None", "unanswerable", "image", "<|im_end|>", '""', "???")
]
EMPTY += [case("<think>Nothing to say.</think>", "empty"), case("The image", "empty"), case("Caption:", "empty")]

LOOPING = [
    case("a man in a suit and a man in a suit and a man in a suit and a man in a suit and", "looping", finish="length"),
    case("a person holding a cell phone in their hand in their hand in their hand", "looping"),
    case("dog dog dog dog dog dog dog dog", "looping"),
    case("!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!", "empty"),
    case("A sign!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!", "looping", finish="length"),
    case(
        "A market. The people are walking. The sky is blue. The people are walking. It is day. The people are walking.",
        "looping",
    ),
    case(
        "A tree. " + "There is a bird on the left and a bird on the right of the tree. " * 9, "looping", finish="length"
    ),
    case('A sign with the text "STOP ' + "STOP " * 40, "looping", finish="length"),
    case("一只猫" + "在垫子上" * 12, "looping", language="zh"),
    case("the the the the the the the the the the", "looping", finish="length"),
    case("A field with " + ", ".join(f"a row of plants number {i}" for i in range(1, 60)), "looping", finish="length"),
]

BLOCKED = [case(None, "blocked", finish="content_filter"), case("A man who", "blocked", None, finish="content_filter")]
BLOCKED += [case(None, "blocked", finish="content_filter: SAFETY"), case("", "blocked", finish="SAFETY")]

LEAKED = [
    case("A red car.<|im_end|>\n<|im_start|>user\nWhat colour is it?", "leaked"),
    case("A red car on a road. USER: What colour is it? ASSISTANT: Red.", "leaked"),
    case("A photo of [insert name] at [location].", "leaked"),
    case("[Your caption here] on a sunny day", "leaked"),
    case("A {subject} in the style of {artist}", "leaked"),
    case("A cat<loc_52><loc_120><loc_300><loc_411> on a mat", "leaked"),
    case("A red car [INST] Describe it [/INST]", "leaked"),
    case(
        "Do not mention the watermark or the text in the corners. A red car.",
        "leaked",
        prompt="Caption this image. Do not mention the watermark or the text in the corners.",
    ),
    case(
        "I need to write one sentence that says what is to be seen, without opinions.",
        "leaked",
        prompt="You are a captioner. Write one sentence that says what is to be seen, without opinions.",
    ),
]

MARKUP = [
    case("| Object | Colour |\n|---|---|\n| car | red |\n| road | grey |", "markup"),
    case('{"objects": [{"name": "car"}, {"name": "road"}], "light": "dim"}', "markup"),
    case('{"objects": [{"name": "car"}, {"na', "markup", finish="length"),
]

LANGUAGE = [
    case(text, "language")
    for text in (
        "Ein Hund läuft am Strand entlang und trägt einen Stock im Maul.",
        "Un perro corre por la playa con un palo en la boca.",
        "Un chien court sur la plage avec un bâton dans la gueule.",
        "Un uomo in piedi in una stanza con una finestra grande.",
        "一只橘猫坐在窗台上，看着外面的雨。",
        "窓辺に座って外の雨を眺めている猫。",
        "Кошка сидит на подоконнике и смотрит на дождь.",
        "고양이가 창가에 앉아 비를 바라보고 있다.",
        "Una donna con un cappotto rosso attraversa la strada innevata.",
        "Um cachorro corre na praia com um graveto na boca.",
        "Een hond rent over het strand met een stok in zijn bek.",
        "قطة تجلس على حافة النافذة وتنظر إلى المطر.",
    )
]

ALL = GOOD + CHANGED + TRUNCATED + COPIED + REFUSED + EMPTY + LOOPING + BLOCKED + LEAKED + MARKUP + LANGUAGE
