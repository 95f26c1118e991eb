"""
COCO's 80 categories in the vocabularies of other data sets: what a detector that was trained on
COCO, or on some of its categories, has seen there.
"""

from collections.abc import Iterable

# The data sets of the columns below.
_DATASETS = ("lvis_v1", "objects365_v2", "ade20k")

# COCO name: (LVIS v1, Objects365 v2, ADE20K), several names separated by "; ", spelt as in the
# official files, their mistakes included.
#
# LVIS: the category that LVIS itself gives as the counterpart (`coco_to_synset.json` of its API),
# the split of "cocofied" LVIS. It has no hot dog.
# Objects365 and ADE20K publish no counterparts. Listed is every category of theirs that certainly
# has objects which COCO annotates under the name on the left, so that unseen is really unseen:
# kinds of it (SUV: car) and, where a vocabulary is coarser, what it belongs to (dog: animal). For
# ADE20K, the 100 categories of instances, under the first of their synonyms.
_COUNTERPARTS = {
    "person": ("person", "Person", "person"),
    "bicycle": ("bicycle", "Bicycle", "bicycle"),
    "car": ("car_(automobile)", "Car; SUV; Van; Sports Car", "car; van"),
    "motorcycle": ("motorcycle", "Motorcycle", "minibike"),
    "airplane": ("airplane", "Airplane", "airplane"),
    "bus": ("bus_(vehicle)", "Bus", "bus"),
    "train": ("train_(railroad_vehicle)", "Train", ""),
    "truck": ("truck", "Truck; Pickup Truck; Heavy Truck; Fire Truck", "truck"),
    "boat": ("boat", "Boat; Sailboat; Ship", "boat; ship"),
    "traffic light": ("traffic_light", "Traffic Light", "traffic light"),
    "fire hydrant": ("fireplug", "Fire Hydrant", ""),
    "stop sign": ("stop_sign", "Stop Sign", ""),
    "parking meter": ("parking_meter", "Parking meter", ""),
    "bench": ("bench", "Bench", "bench"),
    "bird": ("bird", "Wild Bird; Duck; Goose; Pigeon; Swan; Parrot; Penguin", "animal"),
    "cat": ("cat", "Cat", "animal"),
    "dog": ("dog", "Dog", "animal"),
    "horse": ("horse", "Horse", "animal"),
    "sheep": ("sheep", "Sheep", "animal"),
    "cow": ("cow", "Cow", "animal"),
    "elephant": ("elephant", "Elephant", "animal"),
    "bear": ("bear", "Bear", "animal"),
    "zebra": ("zebra", "Zebra", "animal"),
    "giraffe": ("giraffe", "Giraffe", "animal"),
    "backpack": ("backpack", "Backpack", "bag"),
    "umbrella": ("umbrella", "Umbrella", ""),
    "handbag": ("handbag", "Handbag/Satchel", "bag"),
    "tie": ("necktie", "Tie", ""),
    "suitcase": ("suitcase", "Luggage", "bag"),
    "frisbee": ("frisbee", "Frisbee", ""),
    "skis": ("ski", "Skiboard", ""),
    "snowboard": ("snowboard", "Snowboard", ""),
    "sports ball": (
        "ball",
        # The file has "Table Tennis " (the ball), with the space.
        "Soccer; Basketball; Baseball; Volleyball; Tennis; Golf Ball; American Football; "
        "Other Balls; Table Tennis ",
        "ball",
    ),
    "kite": ("kite", "Kite", ""),
    "baseball bat": ("baseball_bat", "Baseball Bat", ""),
    "baseball glove": ("baseball_glove", "Baseball Glove", ""),
    "skateboard": ("skateboard", "Skateboard", ""),
    "surfboard": ("surfboard", "Surfboard", ""),
    "tennis racket": ("tennis_racket", "Tennis Racket", ""),
    "bottle": ("bottle", "Bottle", "bottle"),
    "wine glass": ("wineglass", "Wine Glass", "glass"),
    "cup": ("cup", "Cup", "glass"),
    "fork": ("fork", "Fork", ""),
    "knife": ("knife", "Knife", ""),
    "spoon": ("spoon", "Spoon", ""),
    "bowl": ("bowl", "Bowl/Basin", ""),
    "banana": ("banana", "Banana", "food"),
    "apple": ("apple", "Apple", "food"),
    "sandwich": ("sandwich", "Sandwich", "food"),
    "orange": ("orange_(fruit)", "Orange/Tangerine", "food"),
    "broccoli": ("broccoli", "Broccoli", "food"),
    "carrot": ("carrot", "Carrot", "food"),
    "hot dog": ("", "Hot dog", "food"),
    "pizza": ("pizza", "Pizza", "food"),
    "donut": ("doughnut", "Donut", "food"),
    "cake": ("cake", "Cake", "food"),
    "chair": ("chair", "Chair", "chair; armchair; swivel chair"),
    "couch": ("sofa", "Couch", "sofa"),
    "potted plant": ("flowerpot", "Potted Plant", "pot"),
    "bed": ("bed", "Bed", "bed"),
    "dining table": ("dining_table", "Dinning Table", "table"),
    "toilet": ("toilet", "Toilet", "toilet"),
    "tv": ("television_set", "Moniter/TV", "television receiver; monitor"),
    "laptop": ("laptop_computer", "Laptop", "computer"),
    "mouse": ("mouse_(computer_equipment)", "Mouse", ""),
    "remote": ("remote_control", "Remote", ""),
    "keyboard": ("computer_keyboard", "Keyboard", ""),
    "cell phone": ("cellular_telephone", "Cell Phone", ""),
    "microwave": ("microwave_oven", "Microwave", "microwave"),
    "oven": ("oven", "Oven", "oven; stove"),
    "toaster": ("toaster", "Toaster", ""),
    "sink": ("sink", "Sink", "sink"),
    "refrigerator": ("refrigerator", "Refrigerator", "refrigerator"),
    "book": ("book", "Book", "book"),
    "clock": ("clock", "Clock", "clock"),
    "vase": ("vase", "Vase", "vase"),
    "scissors": ("scissors", "Scissors", ""),
    "teddy bear": ("teddy_bear", "Stuffed Toy", "plaything"),
    "hair drier": ("hair_dryer", "Hair Dryer", ""),
    "toothbrush": ("toothbrush", "Toothbrush", ""),
}

# COCO's 80 names, in the order of COCO's ids.
COCO_NAMES = tuple(_COUNTERPARTS)
# LVIS's counterparts alone are the same categories; those of others are kinds, or coarser.
LVIS_TO_COCO = {lvis: name for name, (lvis, *_) in _COUNTERPARTS.items() if lvis}


def counterparts(dataset: str, coco_names: Iterable[str]) -> tuple[str, ...]:
    """
    Args:
        dataset: "lvis_v1", "objects365_v2" or "ade20k".
        coco_names: COCO categories.

    Returns:
        the names that these categories have in that data set, each once.
    """
    column = _DATASETS.index(dataset)
    cells = (_COUNTERPARTS[name][column] for name in coco_names)
    return tuple(dict.fromkeys(name for cell in cells if cell for name in cell.split("; ")))
