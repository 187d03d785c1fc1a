"""The second stage: what a frozen teacher knows is the lesson of one student or several."""
