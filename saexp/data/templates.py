"""What is asked about an entity's attributes."""

from collections.abc import Mapping

Templates = Mapping[str, Mapping[str, tuple[str, str]]]
"""Entity type -> attribute -> (question, beginning of an answer), with {entity} in both."""

TEMPLATES: Templates = {
    "player": {
        "birthplace": (
            "In which city was the player {entity} born?",
            "The player {entity} was born in the city of",
        ),
        "birth_year": (
            "In what year was the player {entity} born?",
            "The player {entity} was born in the year",
        ),
        "teams": (
            "Name one team that the player {entity} has played for.",
            "The player {entity} has played for the team",
        ),
    },
    "movie": {
        "director": (
            "Who directed the movie {entity}?",
            "The movie {entity} was directed by",
        ),
        "screenwriter": (
            "Who wrote the screenplay of the movie {entity}?",
            "The screenplay of the movie {entity} was written by",
        ),
        "cast": (
            "Name one actor who stars in the movie {entity}.",
            "An actor who stars in the movie {entity} is",
        ),
        "genre": (
            "Which genre does the movie {entity} belong to?",
            "The movie {entity} belongs to the genre of",
        ),
        "release_year": (
            "In what year was the movie {entity} released?",
            "The movie {entity} was released in the year",
        ),
        "duration": (
            "How many minutes long is the movie {entity}?",
            "The duration of the movie {entity}, in minutes, is",
        ),
    },
    "city": {
        "country": (
            "In which country is the city of {entity}?",
            "The city of {entity} is in the country of",
        ),
        "population": (
            "What is the population of the city of {entity}, as a number?",
            "The population of the city of {entity}, as a number, is",
        ),
        "elevation": (
            "How many metres above sea level is the city of {entity}?",
            "The elevation of the city of {entity}, in metres, is",
        ),
        "coordinates": (
            "What are the latitude and longitude of the city of {entity}, in decimal degrees?",
            "The latitude and longitude of the city of {entity}, in decimal degrees, are",
        ),
    },
    "song": {
        "performer": (
            "Who performs the song {entity}?",
            "The song {entity} is performed by",
        ),
        "album": (
            "On which album is the song {entity}?",
            "The song {entity} is on the album",
        ),
        "year": (
            "In what year was the song {entity} released?",
            "The song {entity} was released in the year",
        ),
        "genre": (
            "Which genre does the song {entity} belong to?",
            "The song {entity} belongs to the genre of",
        ),
    },
}
