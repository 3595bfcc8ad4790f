"""Accuracy of a published float network right after its step sizes are set, before any training.

    python -m benchmarks.first_steps --data_dir=DIR --weights=resnet20_cifar10.safetensors

DIR holds TFDS's cifar10 as array_record files. Rows are rules of the weights' first step sizes;
inputs have 8 bits, and so have the first and the last layer. No batch is normalized by its own
statistics and nothing is recalibrated.
"""

import argparse

import jax
import jax.numpy as jnp

import mpq_jax as mpq
from mpq_jax import data
from mpq_jax.methods.rfquant.options import QUANTIZERS
from mpq_jax.tasks import evaluation

BITS = (8, 6, 5, 4)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--model", default="resnet20")
    arguments = parser.parse_args()
    dataset = data.load(
        "tfds",
        batch_size=250,
        seed=0,
        validation_fraction=0.1,
        mean=MEAN,
        std=STD,
        dataset="cifar10",
        data_dir=arguments.data_dir,
    )

    def normalize(images):
        return data.normalize(images, mean=dataset.mean, std=dataset.std)

    model = mpq.make_model(arguments.model, num_classes=dataset.num_classes)
    variables = mpq.import_torch(
        arguments.model, arguments.weights, image_shape=dataset.image_shape
    )
    table = mpq.trace_layers(model, dataset.image_shape, rules=mpq.bit_rules(BITS))
    calibration = normalize(next(dataset.train_batches(0))["image"])

    def predict(variables, bits, images):
        return model.apply(variables, images, train=False)

    evaluate = evaluation.make_evaluate(predict, normalize)
    score = evaluate(jax.tree.map(jnp.asarray, variables), None, dataset.eval_batches("test"))
    print(f"float: {score.accuracy:.2%} of {score.images} test images")
    print(f"| rule | {' | '.join(f'w{bits}a8' for bits in BITS)} |")
    print("|---" * (1 + len(BITS)) + "|")
    for name, quantizer in QUANTIZERS.items():
        net = mpq.Supernet(model, table, quantizer=quantizer)
        state = jax.jit(mpq.Supernet.init, static_argnums=0)(net, variables, calibration)
        evaluate = evaluation.make_evaluate_all(net.apply, normalize)
        configs = {bits: table.uniform(bits, 8) for bits in BITS}
        scores = evaluate(state, configs, dataset.eval_batches("test"))
        print(f"| {name} | {' | '.join(f'{scores[bits].accuracy:.2%}' for bits in BITS)} |")


if __name__ == "__main__":
    main()
