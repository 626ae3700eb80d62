"""The words of the drawn world in English and Chinese: names, templates, question forms.

Tables only. `language.py` turns facts into sentences with them, and reads sentences back into facts.
"""

LANGUAGES = ("en", "zh")

# --- names -----------------------------------------------------------------------------------------------
_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
_CHINESE_COLOURS = ("红色", "橙色", "黄色", "绿色", "蓝色", "紫色", "粉色", "白色")
COLOUR_WORDS = {"en": {c: c for c in _COLOURS}, "zh": dict(zip(_COLOURS, _CHINESE_COLOURS, strict=True))}
# kind: (English noun, English verb, Chinese measure word, Chinese noun, Chinese verb, group)
_KIND_TABLE = {
    "bird": ("bird", "is flying", "只", "鸟", "飞翔", "animal"),
    "dog": ("dog", "is waiting", "只", "狗", "等待", "animal"),
    "cat": ("cat", "is resting", "只", "猫", "休息", "animal"),
    "panda": ("panda", "is sitting", "只", "熊猫", "坐着", "animal"),
    "car": ("car", "is standing", "辆", "汽车", "停着", "vehicle"),
    "bicycle": ("bicycle", "is standing", "辆", "自行车", "停着", "vehicle"),
    "boat": ("boat", "is sailing", "艘", "帆船", "航行", "vehicle"),
    "rocket": ("rocket", "is rising", "枚", "火箭", "上升", "vehicle"),
    "balloon": ("balloon", "is floating", "个", "热气球", "飘浮", "toy"),
    "kite": ("kite", "is dancing", "只", "风筝", "飘舞", "toy"),
    "tree": ("tree", "is growing", "棵", "树", "生长", "plant"),
    "flower": ("flower", "is blooming", "朵", "花", "开放", "plant"),
    "house": ("house", "is standing", "座", "房子", "立着", "building"),
    "astronaut": ("astronaut", "is waving", "名", "宇航员", "挥手", "person"),
    "reader": ("old reader", "is reading a book", "位", "看书的老人", "读书", "person"),
    "dancer": ("dancer", "is turning", "名", "舞者", "旋转", "person"),
}
_NOUNS, _VERBS, MEASURES, _CHINESE_NOUNS, _CHINESE_VERBS, GROUPS = (
    dict(zip(_KIND_TABLE, column, strict=True)) for column in zip(*_KIND_TABLE.values(), strict=True)
)
KIND_WORDS = {"en": _NOUNS, "zh": _CHINESE_NOUNS}
VERBS = {"en": _VERBS, "zh": _CHINESE_VERBS}
PEOPLE = frozenset(kind for kind, group in GROUPS.items() if group == "person")
GROUP_WORDS = {
    "en": {g: g for g in ("animal", "vehicle", "toy", "plant", "building", "person")},
    "zh": {"animal": "动物", "vehicle": "交通工具", "toy": "玩具", "plant": "植物", "building": "建筑", "person": "人"},
}
# setting: (what it is, where things are, the one word that reads it back)
SETTING_WORDS = {
    "en": {
        "beach": ("a beach at sunset", "on a beach at sunset", "beach"),
        "sky": ("a sky with clouds", "in a sky with clouds", "sky"),
        "street": ("a city street at night", "on a city street at night", "street"),
        "space": ("outer space", "in outer space", "space"),
        "park": ("a park", "in a park", "park"),
        "grassland": ("a wide grassland", "on a wide grassland", "grassland"),
        "waterfall": ("a waterfall with a rainbow", "by a waterfall with a rainbow", "waterfall"),
        "snow": ("mountains in the snow", "in the snow", "snow"),
        "lake": ("a quiet lake", "by a quiet lake", "lake"),
        "desert": ("a hot desert", "in a hot desert", "desert"),
    },
    "zh": {
        "beach": ("日落的海滩", "在日落的海滩上", "海滩"),
        "sky": ("有云的天空", "在有云的天空中", "天空"),
        "street": ("夜晚的城市街道", "在夜晚的城市街道上", "街道"),
        "space": ("太空", "在太空中", "太空"),
        "park": ("公园", "在公园里", "公园"),
        "grassland": ("宽阔的草原", "在宽阔的草原上", "草原"),
        "waterfall": ("有彩虹的瀑布", "在有彩虹的瀑布边", "瀑布"),
        "snow": ("雪山", "在雪山上", "雪山"),
        "lake": ("安静的湖边", "在安静的湖边", "湖边"),
        "desert": ("炎热的沙漠", "在炎热的沙漠里", "沙漠"),
    },
}
PLACE_WORDS = {
    "en": {"left": "on the left", "middle": "in the middle", "right": "on the right"},
    "zh": {"left": "左边", "middle": "中间", "right": "右边"},
}
DISTANCE_WORDS = {"en": {"near": "near us", "far": "far away"}, "zh": {"near": "近处", "far": "远处"}}
TOTAL_MEASURE = "样"
NUMBERS = {"en": ("zero", "one", "two", "three", "four"), "zh": ("零", "一", "两", "三", "四")}
YES = {"en": "Yes.", "zh": "是的。"}
NO = {"en": "No.", "zh": "没有。"}
NOTHING = {"en": "Nothing.", "zh": "什么也没有。"}

# what the light says, and how one can tell: the simple reasoning of the instruction data
TIME_ANSWERS = {
    "en": {
        "beach": "It is evening, because the sun is low over the water.",
        "street": "It is night, because the lamps are lit.",
        "space": "It is dark, because only stars shine.",
        "day": "It is day, because everything is bright.",
    },
    "zh": {
        "beach": "现在是傍晚，因为太阳低垂在水面上。",
        "street": "现在是夜晚，因为路灯亮着。",
        "space": "周围很暗，因为只有星星在发光。",
        "day": "现在是白天，因为周围很明亮。",
    },
}

# --- templates -------------------------------------------------------------------------------------------
# {things}: the list of noun phrases; {where}, {name}: the setting's two forms
CAPTIONS = {
    "en": ("{things} {where}", "{things}, seen {where}", "{where}: {things}"),
    "zh": ("{where}有{things}", "{things}，{where}", "{name}：{things}"),
}
OPENINGS = {
    "en": ("This picture shows {name}.", "The picture was painted {where}.", "We are {where}."),
    "zh": ("这幅图片展示了{name}。", "这幅图画的是{name}。", "我们{where}。"),
}
# {thing}: a noun phrase; {place}, {distance}, {verb}: where it is, how far, what it does
SENTENCES = {
    "en": (
        "{Place}, {distance}, there is {thing}.",
        "{Place} we can see {thing}, {distance}.",
        "{Thing} {verb} {place}, {distance}.",
    ),
    "zh": (
        "{place}的{distance}有{thing}。",
        "在{place}的{distance}可以看到{thing}。",
        "{thing}在{place}的{distance}{verb}。",
    ),
}
CLOSINGS = {
    "en": ("There {be} {number} {noun} in all.", "It makes a calm and friendly scene."),
    "zh": ("一共有{number}样东西。", "整个画面平静而友好。"),
}
NOISE = {
    "en": ("In the background there is also {thing}.", "Behind it one can make out {thing}."),
    "zh": ("背景中还有{thing}。", "后面还能看到{thing}。"),
}
# question forms by type; the answer to each type has one form, so that right and wrong are exact
QUESTIONS = {
    "en": {
        "what": ("What is {place}?", "What can you see {place}?"),
        "where": ("Where is the {thing}?", "In which part of the picture is the {thing}?"),
        "count": ("How many {kinds} are there?", "How many {kinds} can you see?"),
        "total": ("How many things are there in all?", "Count the things in the picture."),
        "colour": ("What colour is the {kind}?", "Tell me the colour of the {kind}."),
        "exists": ("Is there {kind} in the picture?", "Can you see {kind} here?"),
        "setting": ("What kind of place is this?", "Where does this scene take place?"),
        "distance": ("Is the {thing} near or far?", "How far away is the {thing}?"),
        "compare": ("Which is further left, the {thing} or the {other}?",),
        "time": ("Is it day or night, and how can you tell?", "What time of day is it?"),
    },
    "zh": {
        "what": ("{place}有什么？", "你在{place}看到了什么？"),
        "where": ("{thing}在哪里？", "{thing}在图片的哪个位置？"),
        "count": ("图中有几{measure}{kind}？", "你能看到几{measure}{kind}？"),
        "total": ("一共有几样东西？", "数一数图中的东西。"),
        "colour": ("{kind}是什么颜色的？", "请告诉我{kind}的颜色。"),
        "exists": ("图中有{kind}吗？", "你能看到{kind}吗？"),
        "setting": ("这是什么地方？", "这个场景发生在哪里？"),
        "distance": ("{thing}是近还是远？", "{thing}离我们有多远？"),
        "compare": ("{thing}和{other}，哪个更靠左？",),
        "time": ("现在是白天还是夜晚，你是怎么知道的？", "现在是什么时候？"),
    },
}
QUESTION_TYPES = tuple(QUESTIONS["en"])
