"""world.py: the simulated robot of vidar.py and vidarc.py, with three cameras.

Two planar arms of six joints with a gripper each stand at a table with two blocks and a plate. A point is a
complex number x + iy, y away from the robot; the table is seen from above. A joint angle is relative to the
previous link, the first one to +y, so a mirrored pose has the opposite sign at all joints. Actions and states
are (14,): 0-5 left joints in radians, 6 left gripper (1 open, 0 closed), 7-12 right joints, 13 right gripper.

    world = ArmWorld(seed=0)
    for action in world.expert_actions(36):            # absolute joint targets, one per frame of 1/10 s
        success = world.step(action)
        image = world.observe()                        # H W 3 uint8, the three views in one mosaic
"""
import itertools
import math

import numpy as np

ACTION_DIM = 14
VIEWS = ("fixed rear", "movable left arm", "movable right arm")        # of the mosaic, for the prompt
RANDOM_POSES = "be in random poses."                # instruction of episodes that show random poses, no task

LINKS = np.array([.24, .21, .19, .17, .15, .13])    # lengths
HAND = .09                                          # from the end of the last link to the grasp point
BASES = (-.48 - .72j, .48 - .72j)
FOLDED = np.array([1.2, -.6, -.8, -.7, -.2, .3])    # left arm; inverse kinematics stays close to it
START = np.concatenate([FOLDED, [1.], -FOLDED, [1.]])
EXPERT_SPEED = np.tile([*[.09] * 6, .25], 2)        # maximum radians and gripper opening per frame
MAX_SPEED = 1.25 * EXPERT_SPEED                     # of the robot: step() clips the motion per frame to this
CLOSED = .55                                        # closing below this opening grasps a block
OPEN = .7                                           # opening above this releases the block
GRASP_RADIUS = .22                                  # a block within this distance of the hand is grasped
PLATE_RADIUS = .15
BLOCK = .085                                        # half the side of a block
BLOCK_COLORS = {"red": (205, 40, 40), "blue": (40, 80, 215)}
ARM_COLORS = (((75, 25, 120), (215, 165, 245), (145, 70, 205)),                    # links of the left arm
              ((0, 80, 85), (150, 230, 220), (20, 160, 155)))
FINGER_COLOR = (25, 25, 30)


def forward_kinematics(pose, arm):
    """Joint angles and gripper (7,) of an arm -> joint positions (7,), the point between its fingers, the
    direction of the fingers (a unit number). The first position is the base, the last is the wrist."""
    directions = 1j * np.exp(1j * np.cumsum(pose[:6]))
    joints = BASES[arm] + np.concatenate([[0], np.cumsum(LINKS * directions)])
    return joints, joints[-1] + HAND * directions[-1], directions[-1]


def inverse_kinematics(pose, arm, goal):
    """-> pose (7,) with the hand at `goal`, or as close as 40 iterations get. Damped least squares, with a
    pull towards the folded pose projected to the null space of the Jacobian. The gripper does not change.
    """
    pose = pose.copy()
    for _ in range(40):
        joints, hand, _ = forward_kinematics(pose, arm)
        columns = 1j * (hand - joints[:6])
        jacobian = np.stack([columns.real, columns.imag])
        pull = .3 * (START[7 * arm:7 * arm + 6] - pose[:6])
        error = goal - hand
        error = np.array([error.real, error.imag]) - jacobian @ pull
        step = pull + jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 1e-3 * np.eye(2), error)
        pose[:6] += np.clip(step, -.2, .2)
    return pose


def random_points(rng, arms):
    """Random points on the table, one within reach of each arm of `arms`."""
    while True:
        points = [complex((2 * arm - 1) * rng.uniform(0, .75), rng.uniform(-.35, .4)) for arm in arms]
        if all(.45 < abs(point - BASES[arm]) < 1 for point, arm in zip(points, arms)):
            return points


def random_poses(rng, arm, count=25):
    """`count` poses (7,) of an arm with the hand at random points of the table."""
    start = START[7 * arm:7 * arm + 7]
    return [inverse_kinematics(start, arm, random_points(rng, [arm])[0]) for _ in range(count)]


def joint_path(start, waypoints, n):
    """(14,) and a list of (14,) -> n targets (n, 14): straight lines in joint space at EXPERT_SPEED, then the
    last waypoint. A path depends on the current state only, so a new plan equals the rest of the old one.
    """
    rows = []
    for target in waypoints:
        steps = math.ceil(np.abs((target - start) / EXPERT_SPEED).max() - 1e-6)
        rows += list(np.linspace(start, target, steps + 1)[1:])
        start = target
    return np.array((rows + [start] * n)[:n])


def clip01(x):
    """Clips to [0, 1], five times faster than np.clip on small arrays."""
    return np.minimum(np.maximum(x, 0), 1)


def render_view(shapes, size, center, up, width):
    """Renders a camera above the table -> image H W 3 float32, arm coverage H W in [0, 1]. The image is
    `width` wide in units of the table, centered at `center`, with direction `up` pointing up.

    shapes: (p, q, radius, color, is_arm) in drawing order: a capsule from p to q, or a square (q is None).
    Edges are anti-aliased by their signed distance."""
    H, W = size
    scale = W / width
    rotation = scale * 1j / complex(up)                                    # table -> pixels, y up
    pixels = np.complex64((np.arange(W) + .5 - W / 2) + 1j * (H / 2 - np.arange(H) - .5)[:, None])
    image = np.full((H, W, 3), 200, np.float32)
    arm_coverage = np.zeros((H, W), np.float32)
    for p, q, radius, color, is_arm in shapes:
        a = (p - center) * rotation
        b = ((p if q is None else q) - center) * rotation
        margin = scale * radius * (1.5 if q is None else 1) + 1
        left = min(a.real, b.real) - margin + W / 2
        right = max(a.real, b.real) + margin + W / 2
        top = H / 2 - max(a.imag, b.imag) - margin
        bottom = H / 2 - min(a.imag, b.imag) + margin
        if right < 0 or left > W or bottom < 0 or top > H:
            continue
        box = slice(max(0, int(top)), int(bottom) + 1), slice(max(0, int(left)), int(right) + 1)
        offset = pixels[box] - complex(a)
        if q is None:
            offset *= complex(scale / rotation)
            distance = np.maximum(abs(offset.real), abs(offset.imag))
        else:
            axis = complex(b - a) or 1
            fraction = clip01((offset * (1 / axis)).real)              # of the distance from p to q
            distance = abs(offset - fraction * complex(b - a))
        coverage = clip01(float(scale * radius) + .5 - distance)
        image[box] += coverage[..., None] * (np.float32(color) - image[box])
        if is_arm:
            arm_coverage[box] = np.maximum(arm_coverage[box], coverage)
    return image, arm_coverage


class ArmWorld:
    """The robot, its table and a task: grasp the named block with the named arm and put it on the plate.

    seed: an integer or a sequence of integers. size: height and width of the mosaic. moved: the frame at
    which the block jumps to another position, .35 to .6 away (None: never). Neither position is close to the
    initial hand, so a gripper that closes without moving there grasps nothing. copy.deepcopy gives an
    independent copy for planning.

    state: (14,) joints and grippers that observe() shows. active_arm: 0 (left) or 1 (right). instruction: the
    text of the task.
    """

    def __init__(self, seed, size=(112, 96), moved=None):
        rng = np.random.default_rng(seed)          # the order of the draws defines the world
        self.size = size
        self.moved = moved
        self.time = 0
        self.success = False
        self.active_arm = int(rng.integers(2))
        names = [str(name) for name in rng.choice(list(BLOCK_COLORS), 2, replace=False)]
        self.colors = [BLOCK_COLORS[name] for name in names]
        side = ("left", "right")[self.active_arm]
        self.instruction = f"using {side} arm, put the {names[0]} block on the plate."
        self.rest = START + rng.normal(0, .03, ACTION_DIM)
        self.state = self.rest + rng.normal(0, .05, ACTION_DIM)
        self.rest[[6, 13]] = self.state[[6, 13]] = 1
        self.held = [None, None]                   # per arm: index of the grasped block
        self.grasp_offset = [0j, 0j]               # per arm: block relative to the hand, in the hand's frame
        self.plate = complex(*rng.normal(0, .03, 2))                   # within reach of both arms
        hand = forward_kinematics(self.rest[7 * self.active_arm:7 * self.active_arm + 7], self.active_arm)[1]
        while True:
            points = random_points(rng, [self.active_arm, self.active_arm, int(rng.integers(2))])
            block, self.moved_to, other = points
            spacing = min(abs(p - q) for p, q in itertools.combinations([self.plate, *points], 2))
            clearance = min(abs(block - hand), abs(self.moved_to - hand))
            if spacing >= .27 and .35 <= abs(block - self.moved_to) <= .6 and clearance >= .25:
                break
        self.blocks = [block, other]               # positions, the task's block first

    def distance(self):
        """Distance from the task's block to the middle of the plate."""
        return abs(self.blocks[0] - self.plate)

    def move_block(self, offset):
        """Displaces the task's block by a complex number. A gripper that holds the block loses it."""
        self.blocks[0] += offset
        self.held = [None if index == 0 else index for index in self.held]

    def step(self, action):
        """Moves one frame towards absolute targets (14,) -> whether the block has been put on the plate."""
        before = self.state
        self.state = self.state + np.clip(action - self.state, -MAX_SPEED, MAX_SPEED)
        self.state[[6, 13]] = self.state[[6, 13]].clip(0, 1)
        self.time += 1
        if self.time == self.moved:
            self.move_block(self.moved_to - self.blocks[0])
        for arm in (0, 1):
            self.update_grasp(arm, before[7 * arm + 6])
        self.success |= self.distance() < PLATE_RADIUS and 0 not in self.held
        return self.success

    def update_grasp(self, arm, opening_before):
        """Grasps, carries or releases a block, given the gripper's opening of the previous frame."""
        pose = self.state[7 * arm:7 * arm + 7]
        opening = pose[6]
        _, hand, direction = forward_kinematics(pose, arm)
        offsets = [(block - hand) / direction for block in self.blocks]
        nearest = int(np.argmin(np.abs(offsets)))
        if opening > OPEN:
            self.held[arm] = None
        elif opening_before >= CLOSED > opening and abs(offsets[nearest]) < GRASP_RADIUS:
            self.held[arm] = nearest
            self.grasp_offset[arm] = offsets[nearest]
        if self.held[arm] is not None:
            self.grasp_offset[arm] *= .5                               # the fingers center the block
            self.blocks[self.held[arm]] = hand + self.grasp_offset[arm] * direction

    def expert_actions(self, n):
        """Targets (n, 14) from the current state: the rest of reach, close, carry, open, retreat."""
        arm = slice(7 * self.active_arm, 7 * self.active_arm + 7)
        block = inverse_kinematics(self.state[arm], self.active_arm, self.blocks[0])
        plate = inverse_kinematics(self.state[arm], self.active_arm, self.plate)

        def waypoint(pose, opening):
            target = self.rest.copy()
            target[arm] = [*pose[:6], opening]
            return target

        plan = [waypoint(self.rest[arm], 1)]
        holding = self.held[self.active_arm] == 0
        off_plate = self.distance() > PLATE_RADIUS
        if holding or off_plate:
            plan = [waypoint(plate, 1), *plan]
        if off_plate or holding and self.distance() > .05:
            plan = [waypoint(plate, .2), *plan]
        if off_plate and not holding:
            plan = [waypoint(block, .2), *plan]
            hand = forward_kinematics(self.state[arm], self.active_arm)[1]
            if abs(hand - self.blocks[0]) > .05:
                plan = [waypoint(block, 1), *plan]
        return joint_path(self.state, plan, n)

    def set_random_pose(self, rng, poses):
        """Puts both arms in random poses: between two of START and `poses` (a list per arm), plus noise;
        sometimes the block is between the fingers. The expert never takes such poses, but they occur in
        generated video (AnyPos, arXiv:2507.12768)."""
        for arm in (0, 1):
            joints = slice(7 * arm, 7 * arm + 7)
            a, b = (START[joints] if rng.random() < .35 else poses[arm][rng.integers(len(poses[arm]))]
                    for _ in range(2))
            self.state[joints] = a + rng.random() * (b - a) + rng.normal(0, .2, 7)
            self.state[7 * arm + 6] = rng.random()
        if rng.random() < .3:
            arm = rng.integers(2)
            self.blocks[0] = forward_kinematics(self.state[7 * arm:7 * arm + 7], arm)[1]

    def shapes(self):
        """-> shapes for render_view in drawing order, and (hand, direction) of each arm."""
        shapes = [(self.plate, self.plate, PLATE_RADIUS, (110, 110, 118), False),
                  (self.plate, self.plate, PLATE_RADIUS - .035, (250, 250, 250), False)]
        shapes += [(block, None, BLOCK, color, False) for block, color in zip(self.blocks, self.colors)]
        hands = []
        for arm in (0, 1):
            pose = self.state[7 * arm:7 * arm + 7]
            joints, hand, direction = forward_kinematics(pose, arm)
            for j, (p, q) in enumerate(zip(joints[:-1], joints[1:])):
                shapes.append((p, q, .07 - .005 * j, ARM_COLORS[arm][j % 3], True))
            wrist = joints[-1]
            across = 1j * (.045 + .07 * pose[6]) * direction   # open fingers reach a block at .2 to .24
            shapes.append((wrist - across, wrist + across, .022, FINGER_COLOR, True))
            for side in (-across, across):
                shapes.append((wrist + side, wrist + side + 1.5 * HAND * direction, .022, FINGER_COLOR, True))
            hands.append((hand, direction))
        return shapes, hands

    def render(self):
        """-> mosaic H W 3 uint8 and arm mask H W bool: the fixed camera above the two wrist cameras, which
        turn with the hands."""
        shapes, hands = self.shapes()
        H, W = self.size
        top = round(H * 2 / 3)
        views = [render_view(shapes, (top, W), -.07j, 1j, 2.)]
        for hand, direction in hands:
            # Centered behind the hand, so that four links are visible.
            views.append(render_view(shapes, (H - top, W // 2), hand - .24 * direction, direction, .9))
        head, left, right = [image for image, _ in views]
        mosaic = np.concatenate([head, np.concatenate([left, right], axis=1)])
        head, left, right = [coverage for _, coverage in views]
        arm_coverage = np.concatenate([head, np.concatenate([left, right], axis=1)])
        return mosaic.round().astype(np.uint8), arm_coverage >= .5

    def observe(self):
        """-> mosaic H W 3 uint8."""
        return self.render()[0]
