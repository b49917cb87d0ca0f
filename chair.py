"""CHAIR, how often captions hallucinate objects (Rohrbach et al. 2018, https://arxiv.org/abs/1809.02156).

    scores = Chair(["a cat on a bed"], [["a dog on a bed", "a bed with a dog"]])

Objects of COCO's 80 categories are found by their names and synonyms. A caption hallucinates a category that it names and none of
its picture's references names. The paper also uses COCO's instance annotations; here there are only reference captions. So the scores
are estimates, comparable only for the same references: too high because five captions do not name every object in the picture, and
too low because objects of other categories do not count.
"""

import re
from functools import cached_property

import numpy as np

# Each category, followed by synonyms; plurals are not listed.
KINDS = """person: people human man woman boy girl child kid baby toddler infant guy gentleman lady player skateboarder skier surfer
    snowboarder rider biker cyclist swimmer batter pitcher catcher umpire soldier policeman officer worker pedestrian crowd adult teenager
    groom bride couple family teammate athlete tourist traveler runner climber
bicycle: bike tricycle
car: automobile van minivan sedan suv hatchback jeep cab taxi coupe limousine convertible
motorcycle: motorbike scooter moped dirtbike
airplane: plane aeroplane aircraft jet jetliner airliner biplane
bus: minibus trolleybus doubledecker
train: locomotive tram caboose streetcar
truck: pickup lorry firetruck semi
boat: ship kayak canoe sailboat rowboat yacht ferry vessel raft gondola speedboat
traffic light: stop light traffic signal stoplight
fire hydrant: hydrant
stop sign: stop signs
parking meter: meter
bench: pew
bird: duck goose gull seagull pigeon parrot ostrich owl hawk eagle swan crow sparrow penguin flamingo peacock rooster hen chicken heron pelican
cat: kitten kitty tabby
dog: puppy hound terrier collie labrador poodle beagle bulldog retriever dachshund husky
horse: pony foal mare stallion colt
sheep: lamb ram ewe
cow: cattle bull calf ox heifer oxen
elephant:
bear: panda cub grizzly
zebra:
giraffe:
backpack: knapsack rucksack
umbrella: parasol
handbag: purse wallet
tie: necktie bow tie
suitcase: luggage suit case
frisbee: flying disc
skis: ski
snowboard:
sports ball: ball baseball football basketball volleyball soccer ball tennis ball
kite:
baseball bat: bat
baseball glove: mitt
skateboard: longboard
surfboard: surf board boogie board bodyboard
tennis racket: racket racquet tennis racquet
bottle:
wine glass: wineglass goblet
cup: mug teacup
fork:
knife: knives
spoon:
bowl:
banana:
apple:
sandwich: burger hamburger cheeseburger sub panini
orange: oranges
broccoli:
carrot:
hot dog: hotdog
pizza:
donut: doughnut
cake: cupcake cheesecake
chair: stool seat armchair recliner
couch: sofa loveseat futon settee
potted plant: house plant houseplant
bed: mattress
dining table: table desk counter
toilet: urinal commode
tv: television tv screen monitor
laptop: notebook computer
mouse: computer mouse
remote: remote control
keyboard:
cell phone: phone cellphone mobile phone smartphone
microwave: microwave oven
oven: stove
toaster:
sink: washbasin
refrigerator: fridge freezer
book:
clock:
vase:
scissors: scissor
teddy bear: teddy stuffed bear stuffed animal
hair drier: hair dryer hairdryer blow dryer
toothbrush: tooth brush"""
PHRASES = """traffic light|stop light|traffic signal|fire hydrant|stop sign|stop signs|parking meter|bow tie|suit case|flying disc|sports ball|
    soccer ball|tennis ball|baseball bat|baseball glove|surf board|boogie board|tennis racket|tennis racquet|wine glass|hot dog|
    potted plant|house plant|dining table|tv screen|notebook computer|computer mouse|remote control|cell phone|mobile phone|microwave oven|
    teddy bear|stuffed bear|stuffed animal|hair drier|hair dryer|blow dryer|tooth brush"""
PHRASES = {*re.sub(r"\s*\n\s*", "", PHRASES).split("|")}
# Word pairs with another meaning than their words: the category that counts, or none.
TOGETHER = {"baseball player": "person", "football player": "person", "soccer player": "person", "tennis player": "person",
            "basketball player": "person", "toilet paper": None, "car seat": "chair", "train track": None, "train station": None,
            "bus stop": None, "bus station": None, "bus driver": "person", "orange juice": None, "apple juice": None, "bird house": None,
            "dog house": None, "horse back": "horse", "baseball field": None, "football field": None, "baseball game": None,
            "football game": None, "basketball court": None, "soccer field": None, "baseball cap": None, "tennis court": None,
            "pizza oven": "oven", "baseball uniform": None, "book shelf": None, "cake pan": None, "cup cake": "cake", "kite board": None,
            "fire truck": "truck", "pick up": None, "tow truck": "truck", "cat bed": "bed", "dog bed": "bed", "parking lot": None,
            "dirt bike": "motorcycle", "motor bike": "motorcycle", "motor cycle": "motorcycle", "toilet seat": "toilet", "jet ski": None}
IRREGULAR = {"men": "man", "women": "woman", "children": "child", "people": "people", "knives": "knives", "mice": "mouse", "geese": "goose",
             "calves": "calf", "skis": "skis", "scissors": "scissors", "oxen": "oxen", "gentlemen": "gentleman", "policemen": "policeman",
             "ladies": "lady", "buses": "bus", "busses": "bus", "glasses": "glass", "oranges": "oranges"}
YOUNG = {"baby", "adult"}  # before an animal, they do not mean a person
ANIMALS = {"bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"}


def read_kinds():
    """{name of one or two words: category}"""
    names = {}
    for line in re.sub(r"\n\s+", " ", KINDS).split("\n"):
        kind, others = line.split(":")
        names[kind] = kind
        rest = f" {others.strip()} "
        for phrase in PHRASES:
            if f" {phrase} " in rest:
                names[phrase] = kind
                rest = rest.replace(f" {phrase} ", " ")
        names |= {word: kind for word in rest.split()}
    # "orange" is often a colour, so only the plural counts.
    names.pop("orange")
    return names


NAMES = read_kinds()


def singular(word):
    """The singular of a noun that is regular or in IRREGULAR."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    for ending, instead in (("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word[:-len(ending)] + instead
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3 else word


def kinds_named(caption):
    """The COCO categories that a caption names, in order and with repetitions: [category, …]"""
    words = [singular(word) for word in re.findall(r"[a-z]+", re.sub(r"['’]s\b", "", caption.lower()))]
    found, place = [], 0
    while place < len(words):
        word, pair = words[place], " ".join(words[place:place + 2])
        if pair in TOGETHER or pair in NAMES:
            kind, place = TOGETHER.get(pair, NAMES.get(pair)), place + 2
        else:
            kind, place = NAMES.get(word), place + 1
            if word in YOUNG and place < len(words) and NAMES.get(words[place]) in ANIMALS:
                kind = None
        if kind:
            found.append(kind)
    return found


class Chair:
    """CHAIR of captions, one for each picture, given each picture's list of references.

    Attributes: `made_up`, for each picture the hallucinated categories, with repetitions.
    """

    def __init__(self, captions, references):
        self.named = [kinds_named(caption) for caption in captions]
        self.true = [{kind for reference in group for kind in kinds_named(reference)} for group in references]
        self.made_up = [[kind for kind in named if kind not in true] for named, true in zip(self.named, self.true)]

    @cached_property
    def images(self):
        """1 for each picture whose caption hallucinates, else 0: (n,). Their mean is CHAIRs."""
        return np.array([float(bool(kinds)) for kinds in self.made_up])

    def scores(self):
        """{"CHAIRs": fraction of captions that hallucinate, "CHAIRi": fraction of named objects that are hallucinated,
        "object recall": fraction of the categories in a picture's references that its caption names}"""
        named, true = sum(map(len, self.named)), sum(map(len, self.true))
        hits = sum(len(true & {*named}) for named, true in zip(self.named, self.true))
        return {"CHAIRs": float(self.images.mean()), "CHAIRi": sum(map(len, self.made_up)) / max(1, named),
                "object recall": hits / max(1, true)}
