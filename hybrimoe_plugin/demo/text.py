"""The text to which the demo model's routers are fitted, written for this purpose."""

CALIBRATION = """<|im_start|>user
What is the capital of Italy?<|im_end|>
<|im_start|>assistant
The capital of Italy is Rome. It lies on the river Tiber and has about three million inhabitants.<|im_end|>
<|im_start|>user
Write a Python function that adds two numbers.<|im_end|>
<|im_start|>assistant
def add(a, b):
    \"\"\"Return the sum of a and b.\"\"\"
    return a + b

for i in range(10):
    print(i, add(i, i * 2))
<|im_end|>
<|im_start|>user
How does rain form?<|im_end|>
<|im_start|>assistant
Water evaporates from seas and lakes and rises with warm air. High up the air cools, and the vapour condenses around
tiny grains of dust into droplets. Droplets collide and grow until they are too heavy for the wind to carry, and they
fall as rain. In cold clouds ice crystals grow first and melt on the way down.<|im_end|>
<|im_start|>user
If a train travels 120 kilometres in 2 hours, how fast is it?<|im_end|>
<|im_start|>assistant
Speed is distance divided by time: 120 / 2 = 60 kilometres per hour.<|im_end|>
<|im_start|>user
Tell me a very short story.<|im_end|>
<|im_start|>assistant
Once upon a time a small fox lived at the edge of a forest. Every morning she watched the geese fly over the lake and
wished that she could follow them. One winter the lake froze, and a goose with a hurt wing could not leave. The fox
brought her berries until spring came. "Thank you," said the goose. "You could not fly, and still you took me
home."<|im_end|>
<|im_start|>user
List three tips for healthy living.<|im_end|>
<|im_start|>assistant
1. Eat fruit and vegetables every day, and drink enough water.
2. Move for at least half an hour: walk, swim or ride a bicycle.
3. Sleep seven to nine hours, and keep the same times.<|im_end|>
<|im_start|>user
Who wrote Hamlet, and when?<|im_end|>
<|im_start|>assistant
William Shakespeare wrote the tragedy around the year 1600. Prince Hamlet of Denmark seeks revenge for his father, whom
his uncle Claudius has murdered to become king.<|im_end|>
The committee shall publish its report within ninety days. Any member may request a copy, provided that the fee stated
in section 4 has been paid. Prices rose by 2.5 percent in March, while exports fell to their lowest level since 2009.
import numpy as np
matrix = np.zeros((3, 3), dtype=float)
matrix[0, 1] = 4.2
print(matrix.sum(axis=0))
Photosynthesis turns light, water and carbon dioxide into sugar and oxygen: 6 CO2 + 6 H2O -> C6H12O6 + 6 O2.
Dear Anna, thank you for your letter. The weather here is lovely, and the children play outside all day. Please give my
regards to your mother. Yours, Thomas
"""  # noqa: E501
