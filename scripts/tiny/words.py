"""Plain nouns for the recall and needle tasks; the tokenizer makes each (with a leading space) one token."""

WORDS = """
acorn almond amber anchor ankle apple apron arrow aspen autumn badge bagel bakery bamboo banana banjo barley barn
basil basin basket beach beacon bean bear beaver bell belt bench berry birch biscuit bison blanket blossom boat bonnet
boot bottle bowl bracelet branch brass bread breeze brick bridge bronze brook broom bucket buffalo butter button
cabbage cabin cactus camel camera canal candle candy canoe canyon carpet carrot castle cedar cello chair chalk cheese
cherry chess chestnut chimney cider cinnamon circus clay cliff clock cloud clover coal coast cobra cocoa coconut coffee
comet copper coral cotton couch cradle crane crayon creek cricket crow crown crystal cucumber cup curtain daisy dawn
deer desert diamond dolphin donkey door dove dragon drum duck dune eagle earth easel ebony elbow elk elm ember emerald
falcon farm feather fern ferry fiddle fig finch fire flag flame flute forest fork fossil fox frog frost garden garlic
garnet gate ginger giraffe glacier glove goat gold goose grain granite grape grass grove guitar hammer harbor harp hat
hawk hazel hedge helmet heron hill hinge honey horn horse hotel igloo iris iron island ivory ivy jacket jade jar jasmine
jelly jewel jungle juniper kayak kettle kitchen kite kitten koala ladder lagoon lake lamb lamp lantern lark lava
lavender lawn leaf lemon lentil leopard lily lime linen lion lizard llama lobster locket lotus lunch lynx magnet mango
maple marble market marsh meadow melon mint mirror mist mitten moon moose moss moth motor mountain mouse museum mustard
nest nickel noodle nutmeg oak oasis oat ocean olive onion onyx opal orange orbit orchid otter oven owl oyster
paddle palace palm panda papaya parrot peach peacock peanut pear pearl pebble pelican pencil penguin pepper piano pickle
pigeon pillow pilot pine pistol planet plate plum pond pony poppy potato prairie pumpkin puppet puppy quail quartz quilt
rabbit radish rain raven reef ribbon rice river robin rocket rose ruby saddle saffron sail salmon salt sand sandal
sapphire scarf school seal shell shirt silk silver skirt sleigh snail snow sock spice spider spinach spoon spruce
squirrel stable star statue stone stork storm stove straw sugar summer sunset swallow swan tea temple thistle thunder
tiger toast tomato topaz torch tower trail train trout trumpet tulip tunnel turkey turnip turtle umbrella valley vanilla
velvet village vine violet violin walnut walrus water whale wheat whistle willow window winter wolf wool wren yacht
zebra
""".split()  # noqa: SIM905
