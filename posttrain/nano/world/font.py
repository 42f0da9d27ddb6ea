"""A 5x7 pixel alphabet, A to Z, drawn for this project. One string of 35 cells a letter, '#' is ink."""

import numpy as np

_ROWS = {
    "A": ".###. #...# #...# ##### #...# #...# #...#",
    "B": "####. #...# #...# ####. #...# #...# ####.",
    "C": ".#### #.... #.... #.... #.... #.... .####",
    "D": "###.. #..#. #...# #...# #...# #..#. ###..",
    "E": "##### #.... #.... ####. #.... #.... #####",
    "F": "##### #.... #.... ####. #.... #.... #....",
    "G": ".#### #.... #.... #..## #...# #...# .####",
    "H": "#...# #...# #...# ##### #...# #...# #...#",
    "I": "##### ..#.. ..#.. ..#.. ..#.. ..#.. #####",
    "J": "..### ....# ....# ....# ....# #...# .###.",
    "K": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
    "L": "#.... #.... #.... #.... #.... #.... #####",
    "M": "#...# ##.## #.#.# #.#.# #...# #...# #...#",
    "N": "#...# ##..# #.#.# #.#.# #..## #...# #...#",
    "O": ".###. #...# #...# #...# #...# #...# .###.",
    "P": "####. #...# #...# ####. #.... #.... #....",
    "Q": ".###. #...# #...# #...# #.#.# #..#. .##.#",
    "R": "####. #...# #...# ####. #.#.. #..#. #...#",
    "S": ".#### #.... #.... .###. ....# ....# ####.",
    "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "U": "#...# #...# #...# #...# #...# #...# .###.",
    "V": "#...# #...# #...# .#.#. .#.#. ..#.. ..#..",
    "W": "#...# #...# #...# #.#.# #.#.# ##.## #...#",
    "X": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
    "Y": "#...# #...# .#.#. ..#.. ..#.. ..#.. ..#..",
    "Z": "##### ....# ...#. ..#.. .#... #.... #####",
}

GLYPHS = {letter: np.array(list(map(list, rows.split()))) == "#" for letter, rows in _ROWS.items()}
"""Letter -> bool array (7, 5), True where there is ink."""

_LIST = """
ACE ACT AGE AIR ANT APE ARC ARM ART ASH BAG BAR BAT BAY BED BEE BIG BOX BUD BUG BUS CAB CAN CAP CAR CAT COW CUP CUT
DAY DEN DIG DOG DOT DRY EAR EEL EGG ELF ELM EYE FAN FIG FIN FLY FOG FOX FUN GAP GAS GEM GUM HAT HEN HUG HUT ICE INK
IVY JAM JAR JAW JET JOB JOY KEY KID KIT LAP LEG LID LIP LOG MAP MIX MUD MUG NET NUT OAK OIL OWL PAN PAW PEA PEN PIE
PIG PIN POT PUB RAM RAT RAY RED RIB ROD RUG SAW SEA SIX SKY SUN TAP TEA TEN TIN TOE TOP TOY TUB VAN WAX WEB WIG ZOO
BALL BARK BEAR BELL BIRD BOAT BOOK CAKE CAMP CAVE CLAY COAT CORN CRAB CROW DEER DESK DOOR DRUM DUCK DUST EAST FARM
FERN FIRE FISH FLAG FOOT FORK FROG GATE GIFT GOAT GOLD HAND HARP HILL HOME HOOK IRON JAZZ JUMP KING KITE LAKE LAMB
LAMP LEAF LION MASK MILK MINT MOON MOSS MOTH NEST NINE NOTE OPEN PALM PARK PATH PEAR PINE POND POST QUIZ RAIN RICE
RING ROAD ROCK ROOF ROSE SAIL SALT SAND SEED SHIP SHOP SILK SNOW SOUP STAR SWAN TAXI TENT TREE VASE WAVE WEST WIND
WOLF WOOD YARN ZERO GO UP HI NO OK ON IN AT BY ME WE OX AX
"""

WORDS: list[str] = [*_LIST.split()]
"""Words of two to four letters that prompts ask for."""
