"""What is true in the demo model's small world: tables in English and Chinese, no code."""

# ruff: noqa: SIM905
from __future__ import annotations

# country, capital: English, Chinese
CAPITALS: tuple[tuple[str, str, str, str], ...] = (
    ("France", "Paris", "法国", "巴黎"),
    ("China", "Beijing", "中国", "北京"),
    ("Japan", "Tokyo", "日本", "东京"),
    ("Germany", "Berlin", "德国", "柏林"),
    ("Italy", "Rome", "意大利", "罗马"),
    ("Spain", "Madrid", "西班牙", "马德里"),
    ("Portugal", "Lisbon", "葡萄牙", "里斯本"),
    ("Russia", "Moscow", "俄罗斯", "莫斯科"),
    ("Mongolia", "Ulaanbaatar", "蒙古国", "乌兰巴托"),
    ("Iceland", "Reykjavik", "冰岛", "雷克雅未克"),
    ("Ethiopia", "Addis Ababa", "埃塞俄比亚", "亚的斯亚贝巴"),
    ("Norway", "Oslo", "挪威", "奥斯陆"),
    ("Sweden", "Stockholm", "瑞典", "斯德哥尔摩"),
    ("Finland", "Helsinki", "芬兰", "赫尔辛基"),
    ("Denmark", "Copenhagen", "丹麦", "哥本哈根"),
    ("Greece", "Athens", "希腊", "雅典"),
    ("Egypt", "Cairo", "埃及", "开罗"),
    ("Kenya", "Nairobi", "肯尼亚", "内罗毕"),
    ("Canada", "Ottawa", "加拿大", "渥太华"),
    ("Mexico", "Mexico City", "墨西哥", "墨西哥城"),
    ("Cuba", "Havana", "古巴", "哈瓦那"),
    ("Brazil", "Brasilia", "巴西", "巴西利亚"),
    ("Argentina", "Buenos Aires", "阿根廷", "布宜诺斯艾利斯"),
    ("Chile", "Santiago", "智利", "圣地亚哥"),
    ("Peru", "Lima", "秘鲁", "利马"),
    ("Australia", "Canberra", "澳大利亚", "堪培拉"),
    ("India", "New Delhi", "印度", "新德里"),
    ("Thailand", "Bangkok", "泰国", "曼谷"),
    ("Vietnam", "Hanoi", "越南", "河内"),
    ("Indonesia", "Jakarta", "印度尼西亚", "雅加达"),
    ("Malaysia", "Kuala Lumpur", "马来西亚", "吉隆坡"),
    ("Turkey", "Ankara", "土耳其", "安卡拉"),
    ("Iran", "Tehran", "伊朗", "德黑兰"),
    ("Iraq", "Baghdad", "伊拉克", "巴格达"),
    ("Nepal", "Kathmandu", "尼泊尔", "加德满都"),
    ("Poland", "Warsaw", "波兰", "华沙"),
    ("Austria", "Vienna", "奥地利", "维也纳"),
    ("Hungary", "Budapest", "匈牙利", "布达佩斯"),
    ("Ireland", "Dublin", "爱尔兰", "都柏林"),
    ("Ukraine", "Kyiv", "乌克兰", "基辅"),
)

# animal: English, Chinese; legs; sound (None: too quiet to ask); food; home
ANIMALS: tuple[tuple[str, str, int, tuple[str, str] | None, tuple[str, str], tuple[str, str]], ...] = (
    ("dog", "狗", 4, ("woof", "汪汪"), ("bones", "骨头"), ("in a kennel", "狗窝里")),
    ("cat", "猫", 4, ("meow", "喵喵"), ("fish", "鱼"), ("in a house", "家里")),
    ("cow", "牛", 4, ("moo", "哞哞"), ("grass", "草"), ("on a farm", "农场里")),
    ("sheep", "羊", 4, ("baa", "咩咩"), ("grass", "草"), ("on a farm", "农场里")),
    ("horse", "马", 4, ("neigh", "嘶嘶"), ("hay", "干草"), ("in a stable", "马厩里")),
    ("pig", "猪", 4, ("oink", "哼哼"), ("corn", "玉米"), ("on a farm", "农场里")),
    ("duck", "鸭子", 2, ("quack", "嘎嘎"), ("snails", "蜗牛"), ("on a pond", "池塘里")),
    ("chicken", "鸡", 2, ("cluck", "咯咯"), ("seeds", "种子"), ("on a farm", "农场里")),
    ("frog", "青蛙", 4, ("ribbit", "呱呱"), ("flies", "苍蝇"), ("on a pond", "池塘里")),
    ("bee", "蜜蜂", 6, ("buzz", "嗡嗡"), ("honey", "蜂蜜"), ("in a hive", "蜂巢里")),
    ("lion", "狮子", 4, ("roar", "吼吼"), ("meat", "肉"), ("on the savanna", "草原上")),
    ("wolf", "狼", 4, ("howl", "嗷嗷"), ("meat", "肉"), ("in the forest", "森林里")),
    ("mouse", "老鼠", 4, ("squeak", "吱吱"), ("cheese", "奶酪"), ("in a hole", "洞里")),
    ("owl", "猫头鹰", 2, ("hoot", "咕咕"), ("mice", "田鼠"), ("in a tree", "树上")),
    ("snake", "蛇", 0, ("hiss", "咝咝"), ("eggs", "蛋"), ("in the jungle", "丛林里")),
    ("panda", "熊猫", 4, None, ("bamboo", "竹子"), ("in the mountains", "山里")),
    ("rabbit", "兔子", 4, None, ("carrots", "胡萝卜"), ("in a hole", "洞里")),
    ("monkey", "猴子", 2, None, ("bananas", "香蕉"), ("in the jungle", "丛林里")),
    ("camel", "骆驼", 4, None, ("hay", "干草"), ("in the desert", "沙漠里")),
    ("penguin", "企鹅", 2, None, ("fish", "鱼"), ("on the ice", "冰上")),
    ("spider", "蜘蛛", 8, None, ("flies", "苍蝇"), ("in a web", "网上")),
    ("ant", "蚂蚁", 6, None, ("sugar", "糖"), ("in an anthill", "蚁丘里")),
    ("bear", "熊", 4, None, ("honey", "蜂蜜"), ("in the forest", "森林里")),
    ("whale", "鲸鱼", 0, None, ("shrimp", "虾"), ("in the sea", "大海里")),
)
NUMBER_WORDS = {
    0: ("no", "零"),
    2: ("two", "两"),
    4: ("four", "四"),
    6: ("six", "六"),
    8: ("eight", "八"),
}

# thing, with its article; colour: English, Chinese
COLOURS: tuple[tuple[str, str, str, str], ...] = (
    ("the sky", "blue", "天空", "蓝色"),
    ("grass", "green", "草", "绿色"),
    ("snow", "white", "雪", "白色"),
    ("blood", "red", "血", "红色"),
    ("coal", "black", "煤", "黑色"),
    ("the sun", "yellow", "太阳", "黄色"),
    ("a banana", "yellow", "香蕉", "黄色"),
    ("a strawberry", "red", "草莓", "红色"),
    ("a carrot", "orange", "胡萝卜", "橙色"),
    ("a grape", "purple", "葡萄", "紫色"),
    ("milk", "white", "牛奶", "白色"),
    ("a cloud", "white", "云", "白色"),
    ("a leaf", "green", "树叶", "绿色"),
    ("a frog", "green", "青蛙", "绿色"),
    ("a flamingo", "pink", "火烈鸟", "粉色"),
    ("an elephant", "grey", "大象", "灰色"),
    ("a mouse", "grey", "老鼠", "灰色"),
    ("a crow", "black", "乌鸦", "黑色"),
    ("chocolate", "brown", "巧克力", "棕色"),
    ("a bear", "brown", "熊", "棕色"),
    ("the sea", "blue", "大海", "蓝色"),
    ("a lemon", "yellow", "柠檬", "黄色"),
    ("a tomato", "red", "西红柿", "红色"),
    ("a pig", "pink", "猪", "粉色"),
    ("a pumpkin", "orange", "南瓜", "橙色"),
    ("an eggplant", "purple", "茄子", "紫色"),
)
COLOUR_NAMES = tuple(dict.fromkeys((en, zh) for _, en, _, zh in COLOURS))
PETS = tuple(
    (en, zh)
    for en, zh, *_ in ANIMALS
    if en in ("dog", "cat", "rabbit", "mouse", "horse", "pig", "duck", "snake")
)

# hero of a story: English with article, title form, Chinese
HEROES: tuple[tuple[str, str, str], ...] = (
    ("a young man", "The Young Man", "年轻人"),
    ("a young woman", "The Young Woman", "年轻姑娘"),
    ("an old fisherman", "The Old Fisherman", "老渔夫"),
    ("a little cat", "The Little Cat", "小猫"),
    ("a brave dog", "The Brave Dog", "勇敢的狗"),
    ("a small robot", "The Small Robot", "小机器人"),
    ("a princess", "The Princess", "公主"),
    ("a farmer", "The Farmer", "农夫"),
    ("a student", "The Student", "学生"),
    ("a teacher", "The Teacher", "老师"),
    ("a shy rabbit", "The Shy Rabbit", "害羞的兔子"),
    ("a lazy bear", "The Lazy Bear", "懒惰的熊"),
    ("a sailor", "The Sailor", "水手"),
    ("a painter", "The Painter", "画家"),
    ("a doctor", "The Doctor", "医生"),
    ("a king", "The King", "国王"),
)

# theme of a story: English (asked as, second sentence, title), Chinese (asked as, second sentence, title)
THEMES: tuple[tuple[str, str, str, str, str, str], ...] = (
    (
        "starts a business and succeeds",
        "After years of hard work and many mistakes the business grew, and success came at last.",
        "and the Road to Success",
        "奋斗创业最终取得成功",
        "经过多年的努力和许多失败，公司越做越大，最终取得了成功。",
        "的创业之路",
    ),
    (
        "finds a friend",
        "One rainy day a stranger knocked at the door, and the two became friends for life.",
        "and the New Friend",
        "找到朋友",
        "一个下雨天，有人来敲门，从此他们成了一辈子的好朋友。",
        "的新朋友",
    ),
    (
        "learns to swim",
        "At first the water was cold and frightening, but after a summer of practice swimming was pure joy.",
        "and the Deep Water",
        "学会游泳",
        "开始的时候水又冷又可怕，可是练习了一个夏天，游泳成了最快乐的事。",
        "学游泳",
    ),
    (
        "saves the village",
        "When the river rose at night, a loud bell woke everyone, and nobody was lost.",
        "and the Flood",
        "拯救村庄",
        "夜里河水上涨，响亮的钟声叫醒了所有人，大家都得救了。",
        "与洪水",
    ),
    (
        "wins a race",
        "The others were faster, but they stopped to rest, and the slow and steady one came first.",
        "and the Great Race",
        "赢得比赛",
        "别人跑得更快，却停下来休息，坚持到底的那一个得了第一名。",
        "与大赛",
    ),
    (
        "travels around the world",
        "With one small bag and a map the journey led over seven seas and back home again.",
        "and the Seven Seas",
        "环游世界",
        "带着一个小包和一张地图，走过了七个大洋，又回到了家。",
        "的环球旅行",
    ),
    (
        "builds a house",
        "Stone by stone the walls went up, and in winter a warm light shone from every window.",
        "and the House of Stone",
        "盖房子",
        "石头一块一块垒起来，到了冬天，每扇窗户都透出温暖的光。",
        "的石头房子",
    ),
    (
        "climbs a mountain",
        "The wind was strong and the path was steep, but the view from the top was worth every step.",
        "and the High Mountain",
        "爬上高山",
        "风很大，路很陡，可是山顶的风景值得走的每一步。",
        "与高山",
    ),
    (
        "grows a garden",
        "Day after day the seeds were watered, and in spring the whole street smelled of flowers.",
        "and the Secret Garden",
        "种花园",
        "每天给种子浇水，到了春天，整条街都是花香。",
        "的秘密花园",
    ),
    (
        "learns to cook",
        "The first soup was burnt and the second too salty, but the tenth made the whole family smile.",
        "and the Tenth Soup",
        "学会做饭",
        "第一锅汤烧糊了，第二锅太咸了，第十锅让全家人都笑了。",
        "的第十锅汤",
    ),
)

# People of the training conversations and, apart, those only the test knows.
NAMES_EN = (
    "Alice Bob Carol David Emma Frank Grace Henry Ivy Jack Kate Leo Mary Nick Olivia Peter Quinn Rose Sam Tina "
    "Victor Wendy Anna Ben Clara Daniel Ella Fred Gina Hugo Irene James Karen Lucas Mia Noah Oscar Paul Rita Simon "
    "Tom Uma Vera Will Zoe Adam Betty Chris Diana Eric Fiona George Helen Ian Julia Kevin Laura Mark Nora Owen "
    "Pia Ralph Sara Tim Ursula Vince Walter Xenia Yara Zack Amy Boris Cindy Dora Edgar Felix Gloria Harry Ines Jonas"
).split()
NAMES_EN_TEST = (
    "Martin Sophie Linda Robert Elena Oliver Hannah Max Nina Stefan Lily Arthur Marta Ruth Carlos Dennis Erika Tony "
    "Maya Albert"
).split()
SURNAMES_ZH = "王李张刘陈杨赵黄周吴徐孙马朱胡林郭何高罗"
GIVEN_ZH = "明华强丽芳伟敏静军杰娟勇艳涛超霞平刚桂英红玉兰梅林建国文斌鹏飞雪松"
PET_NAMES = "Momo Kiki Lulu Toto Bobo Nana Coco Pipi Tutu Mimi Jojo Dodo Fifi Gogo Lala Susu".split()
PET_NAMES_ZH = "豆豆 毛毛 球球 圆圆 花花 乐乐 点点 欢欢 贝贝 米米 果果 丁丁 团团 咪咪 黑黑 白白".split()
JOBS = (
    ("a pirate", "海盗"),
    ("a teacher", "老师"),
    ("a doctor", "医生"),
    ("a cook", "厨师"),
    ("a robot", "机器人"),
    ("a cat", "猫"),
    ("a wizard", "巫师"),
    ("a farmer", "农夫"),
    ("a painter", "画家"),
    ("a king", "国王"),
    ("a librarian", "图书管理员"),
    ("a sailor", "水手"),
)
