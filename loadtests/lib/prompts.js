// Prompts for load: scenes in the words of the shipped student, 12,800 of them, so that caches help nobody.
import { random } from "./plan.js";

const SIZES = ["small", "large"];
const COLOURS = ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "white"];
const SHAPES = ["sphere", "cube", "cone", "cylinder", "torus"];
const RELATIONS = ["left of", "behind"];

// What this iteration asks of a model: prompt and seed.
export function wish(model) {
  const next = random();
  const one = (words) => words[Math.floor(next() * words.length)];
  const solid = () => `a ${one(SIZES)} ${one(COLOURS)} ${one(SHAPES)}`;
  return {
    model: model.id,
    prompt: `${solid()} ${one(RELATIONS)} ${solid()}`,
    seed: Math.floor(next() * 2 ** 31),
  };
}
