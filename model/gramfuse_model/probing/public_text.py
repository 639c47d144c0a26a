"""Public test texts, which contain nobody's data."""

PUBLIC_TEXT = (
    "The quick brown fox jumps over the lazy dog.",
    "Pack my box with five dozen liquor jugs.",
    "Good morning, could you please tell me when the office opens on Saturday?",
    "I have been charged twice this month and would like my money back!",
    "The patient was given 40 mg of the drug at 9:30 and felt better within an hour.",
    "Nobody answered the phone, so we drove to the station and waited in the rain.",
    "Revenue rose by 3.5% in the second quarter, while costs fell slightly.",
    "What a wonderful book: I read it in one night and cried at the end.",
    "no",
    "Terms and conditions apply; see section 4(b) of the agreement dated 1 March 2019.",
    "She plays the violin, he cooks, and their children build castles out of boxes.",
    "ERROR 504: the server did not respond. Restart the device, then try again.",
    "An acid and a base react to give a salt and water.",
    "Does this train stop in Lyon, or do I have to change?",
    "They lost 2-1 after extra time, but the crowd sang until midnight.",
    "Turn left at the bakery, cross the bridge, and you will see it on your right.",
    "Hamlet was written around 1600; its author, William Shakespeare, died in 1616.",
)
"""Texts for probing base models and for measuring the scale of each feature."""
